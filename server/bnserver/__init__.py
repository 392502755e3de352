"""The statistics service: reduces what the ranks of a job contribute, and owns their moving statistics.

`core` decides and `daemon` acts: the core takes events and returns effects, and knows no wire, clock or file.
"""
