"""Three trainings on real data, each with torch's loss and with nllx's: ``python -m demo``."""
