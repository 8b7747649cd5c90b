"""Several devices and several hosts.

- `mesh`: devices on named axes, and batches that are split over them.
- `sharding`: which device holds which part of a base and of its adapters.
- `hosts`: processes on several hosts that join in one job.
- `plan`: the memory that a training needs on each device, before it runs.
"""
