"""What several suites share: ranks in one process, families of data, and the truth to compare with."""
