"""What every layer may import: recipe, errors, metrics catalogue, stop signals. No torch here."""
