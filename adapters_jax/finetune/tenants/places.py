"""Which tenants are on the device; the others wait on the host."""

from collections.abc import Sequence

from adapters_jax.finetune.tenants.programs import Programs, Stack
from adapters_jax.finetune.tenants.waiting import Tenant


class Places:
    """The places of a device, for the tenants that were named last."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._free = list(range(programs.places, 0, -1))
        self._taken: dict[Tenant, int] = {}  # in the order that they were named in

    def of(self, tenants: Sequence[Tenant]) -> list[int]:
        """The places of some tenants, at most as many as there are; those without get one."""
        named = dict.fromkeys(tenants)
        self._taken |= {each: self._taken.pop(each) for each in named if each in self._taken}
        for tenant in [each for each in named if each not in self._taken]:
            if not self._free:
                first = next(iter(self._taken))
                first.arrays = self.arrays(first)
                self.leave(first)
            self._taken[tenant] = self._free.pop()
            self._programs.write(self._taken[tenant], tenant.fit, tenant.arrays)
            tenant.arrays = Stack({}, {}, {}, {})  # old from now on
        return [self._taken[tenant] for tenant in tenants]

    def arrays(self, tenant: Tenant) -> Stack:
        """A tenant's arrays, wherever they are, in its own shapes."""
        if tenant not in self._taken:
            return tenant.arrays
        found = self._programs.read(self._taken[tenant], tenant.fit)
        return found if tenant.summed else found._replace(grads={})

    def leave(self, tenant: Tenant) -> None:
        """Frees a tenant's place, if it has one."""
        if tenant in self._taken:
            self._free.append(self._taken.pop(tenant))
