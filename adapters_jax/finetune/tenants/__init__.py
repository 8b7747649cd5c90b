"""Training many adapters of one base at once, each as if it were alone.

- `engine`: what tenants call, and the thread that works for all of them.
- `waiting`: their requests, and whose rows are next.
- `places`: who is on the device, and who waits on the host.
- `programs`: the adapters, gradients and optimiser states on the device; the compiled programs.
- `rooms`: a tenant's adapter in the shapes of the largest one, and back.
- `losses`: the losses of tokens.
- `requests`: rows, results, and the checks of both.

Reference: Chen et al., Punica: Multi-Tenant LoRA Serving (2023), arXiv:2310.18547.
"""
