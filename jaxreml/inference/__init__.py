"""What follows from a fit: tests, intervals, comparisons, resampling.

Each module takes an `LMMResults`; its methods of the same names lead here.
"""
