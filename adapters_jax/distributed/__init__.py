"""Several devices and several hosts.

- `mesh`: devices under named axes, and batches that are split over them.
- `sharding`: which device holds which part of a base and of its adapters.
- `hosts`: joining the processes of a job.
- `plan`: the memory that a training needs on each device, before it runs.
"""
