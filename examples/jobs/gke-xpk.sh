#!/bin/sh
# Two slices of 16 TPU v6e chips on a GKE cluster that xpk made; xpk writes the JobSet.
xpk workload create --cluster my-cluster --project my-project --zone my-zone \
  --workload adapters --tpu-type v6e-16 --num-slices 2 --max-restarts 10 \
  --docker-image us-docker.pkg.dev/my-project/my-images/adapters:latest \
  --command "python examples/finetune_llama_sharded.py --run gs://my-bucket/runs/first --mesh slice=2,fsdp=-1 --batch 32"
