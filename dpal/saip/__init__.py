"""SAIP, scale-aware image pretraining (arXiv 2503.08201): a student and its moving average."""
