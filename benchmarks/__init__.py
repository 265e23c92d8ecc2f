"""Times nllx against its peers on named shapes: ``python -m benchmarks``. README.md beside this file says how."""
