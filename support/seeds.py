"""Trains several seeds as one computation. On a GPU an update is replayed as one CUDA graph. Loss functions need not
know about either.

    critics, target = make_stacked(make_critics, seeds)   # parameters [S, ...]; for one seed the module as it is
    losses = per_seed(losses, [critics], len(seeds))      # takes batches [S, B]; for one seed [B]
    update = Graph(update)                                # on a GPU it is captured once, then replayed
"""

import copy
import warnings

import torch
from tensordict import TensorDict
from torch import nn
from torch.func import functional_call

VMAPPED = ("cuda",)  # devices on which seeds are vmapped, see per_seed
EAGER_CALLS = 3  # calls before a graph is captured, as torch.cuda.graph requires


def stack(modules: list[nn.Module]) -> nn.Module:
    """A module with the parameters and buffers of the S modules side by side, [S, ...]. Only per_seed can call it."""
    if len(modules) == 1:
        return modules[0]
    stacked = copy.deepcopy(modules[0])
    parameters, buffers = torch.func.stack_module_state(modules)
    for name, tensor in [*stacked.named_parameters(), *stacked.named_buffers()]:
        tensor.data = (parameters | buffers)[name].detach()
    return stacked


def make_stacked(make, seeds: list[int]) -> tuple[nn.Module, nn.Module]:
    """make() for each seed, stacked, and a copy of that without gradients, for target networks and averages.

    A seed has the same first weights as when trained alone.
    """
    each = []
    for seed in seeds:
        torch.manual_seed(seed)
        each.append(make())
    return stack(each), stack(copy.deepcopy(each)).requires_grad_(False)


class Call(nn.Module):
    """function(*modules, *batches) as the forward pass of one module, so that functional_call can swap parameters."""

    def __init__(self, function, modules: list[nn.Module]):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *batches):
        return self.function(*self.parts, *batches)


def per_seed(function, modules: list[nn.Module], n_seeds: int, compiled: bool = False):
    """function(*modules, *batches) for each seed, as a function of the batches.

    The modules are stacked, batches are [S, B], and the results, a tuple or a dict, are [S, ...]. For one seed the
    batches are [B], and the function is called as it is.

    A GPU computes all seeds in one vmapped call. A CPU computes one after another, since its batched products are
    slower than single ones (benchmarks/speed.py). With `compiled`, torch.compile makes one graph, or raises.
    """
    # Why not TensorDict.from_modules and to_module? Inside vmap they left the module without requires_grad (0.14.3).
    call = Call(function, modules)
    state = dict([*call.named_parameters(), *call.named_buffers()])

    def vmapped(*batches):
        return torch.vmap(lambda state, *batches: functional_call(call, state, batches))(state, *batches)

    def one_by_one(*batches):
        states = [dict(zip(state, own)) for own in zip(*(tensor.unbind(0) for tensor in state.values()))]
        results = [
            functional_call(call, own, batch)
            for own, batch in zip(states, zip(*(batch.unbind(0) for batch in batches)))
        ]
        if isinstance(results[0], dict):
            return {name: torch.stack([own[name] for own in results]) for name in results[0]}
        return tuple(torch.stack(values) for values in zip(*results))

    if n_seeds == 1:
        chosen = call
    else:
        chosen = vmapped if next(iter(state.values())).device.type in VMAPPED else one_by_one
    return torch.compile(chosen, fullgraph=True) if compiled else chosen


def split_seeds(results: tuple, seeds: list[int]) -> list[tuple]:
    """The results of per_seed, as one tuple per seed."""
    return [results] if len(seeds) == 1 else list(zip(*results))


def make_generators(seeds: list[int], stage: int, rows: TensorDict) -> list[torch.Generator]:
    """One random generator per seed, on the rows' device. So a seed draws the same batches alone and with others. The
    stages (1, 2) draw different ones."""
    return [torch.Generator(rows["is_init"].device).manual_seed(2 * seed + stage) for seed in seeds]


def name_seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"


def seed_states(parts: dict, generators: list[torch.Generator]) -> list[dict]:
    """For each seed a copy of the states of `parts` (stacked modules, optimisers) and of its generator.

    It has the same layout as when the seed is trained alone.
    """

    def pick(value, s: int, name: str = ""):
        if isinstance(value, dict):
            return {k: copy.deepcopy(v) if k == "param_groups" else pick(v, s, k) for k, v in value.items()}
        return (value[s] if len(generators) > 1 and name != "step" else value).clone()

    states = {name: part.state_dict() for name, part in parts.items()}
    return [pick(states, s) | {"generator": generator.get_state()} for s, generator in enumerate(generators)]


def load_part(part, state: dict):
    """part.load_state_dict(state). An optimiser's learning rates are moved to its parameters' device.

    A checkpoint is read on the CPU. A learning rate on the CPU would be a constant in a CUDA graph.
    """
    part.load_state_dict(state)
    for group in getattr(part, "param_groups", []):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = group["lr"].to(group["params"][0].device)


def load_seeds(parts: dict, generators: list[torch.Generator], states: list[dict]):
    """The inverse of seed_states, for seeds at the same step."""

    def join(values: list, name: str = ""):
        if isinstance(values[0], dict):
            return {k: values[0][k] if k == "param_groups" else join([v[k] for v in values], k) for k in values[0]}
        # A copy: an optimiser would use the tensors of `states` as its own, and change them.
        return torch.stack(values) if len(values) > 1 and name != "step" else values[0].clone()

    for name, part in parts.items():
        load_part(part, join([state[name] for state in states]))
    for generator, state in zip(generators, states):
        generator.set_state(state["generator"])


def adam(groups: list, lr: float, device: torch.device) -> torch.optim.Adam:
    """Adam as one fused kernel, which works in a CUDA graph. The learning rate is a tensor, so a graph sees changes."""
    # This warning is expected: Graph deliberately does not capture its first calls.
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    lr = torch.tensor(lr, dtype=torch.float32, device=device)  # the CUDA kernel reads float32, with any parameters
    return torch.optim.Adam(groups, lr, fused=True, capturable=device.type == "cuda")


def target_update(target: nn.Module, networks: nn.Module, tau: float | torch.Tensor):
    """The step target <- target + tau (networks - target) of every parameter, as a function without arguments.

    It refers to the parameters' memory, so they must keep it, as a CUDA graph requires too. They do: optimisers and
    load_state_dict work in place.
    """
    # If two modules share a parameter, named_parameters lists it once, but TensorDict.from_module twice.
    mine, theirs = (TensorDict(dict(module.named_parameters())).data for module in (target, networks))
    if isinstance(tau, torch.Tensor):  # repeated for every parameter, since lerp_ would read a single one on the host
        tau = theirs.apply(lambda _: tau)
    return lambda: mine.lerp_(theirs, tau)


def set_gradients(loss: torch.Tensor, parameters: list[torch.Tensor]):
    """Sets the parameters' gradients to those of this loss. Raises if the loss does not depend on all of them."""
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        # On a CPU fused Adam ignores strides: a gradient with other strides than its parameter would be misread
        # (PyTorch 2.13).
        parameter.grad = gradient.contiguous()


class Graph:
    """function(*batches) as a CUDA graph if the batches are on a GPU. Otherwise, and without `enabled`, the function.

    The function must work in place, on tensors that keep their memory, and must not make the host wait. Each call
    overwrites the results of the one before. The first calls are not captured, but use the graph's inputs: libraries
    allocate what they need, and torch.compile compiles for these strides. If the capture fails, it raises. TensorDict's
    CudaGraphModule does the same, but waits for the GPU at every replay.
    """

    def __init__(self, function, enabled: bool = True):
        self.function, self.enabled, self.calls, self.inputs, self.graph = function, enabled, 0, None, None

    def __call__(self, *batches: TensorDict):
        if not self.enabled or next(iter(batches[0].values(True, True))).device.type != "cuda":
            return self.function(*batches)
        if self.inputs is None:
            self.inputs = [batch.clone() for batch in batches]
            self.side = torch.cuda.Stream()  # one for all calls, since each stream gets a workspace of cuBLAS
        for mine, batch in zip(self.inputs, batches):
            mine.copy_(batch)
        self.calls += 1
        if self.calls <= EAGER_CALLS:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                results = self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.side)
            return results
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # "thread_local": the thread of the evaluations may use the GPU meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.results = self.function(*self.inputs)
        self.graph.replay()
        return self.results
