"""Tinker's protocol: training and sampling by the client of the package `tinker`, over HTTP.

- `api`: the paths of sessions, models, samples and answers.
- `archives`: those of runs and checkpoints.
- `bodies`: what all of them do with requests.
- `service`: sessions and models, and what clients ask of them.
- `recipes`: what trains of a model.
- `futures`: answers that are on their way, and the order of a model's requests.
- `sampling`: samples, from the server's engine.
- `checkpoints`: what is saved.
- `wire`: protobuf and zstd.
"""
