"""What our rows cost beside what people would use instead: ``python -m benchmarks``.

``README.md`` in this folder says what is compared and how each figure is measured.
"""
