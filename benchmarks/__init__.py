"""What our rows cost beside what people would use instead: ``python -m benchmarks``.

``docs/benchmarks.md`` says what is compared and how each figure is measured.
"""
