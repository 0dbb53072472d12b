"""The science of dpal: models, views, targets, objectives, training engine, evaluation."""
