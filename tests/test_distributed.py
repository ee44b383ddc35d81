"""Several processes: replicas that stay equal, checkpoints, counts that add up, and shards that are refused."""

import copy
import multiprocessing
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import engram_kernels as ek

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")

RANKS = 2
STATES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.int8, torch.float32),
    (torch.int8, torch.bfloat16),
]


def _serve(rank, meeting_place, connection):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting_place, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    while True:
        function, arguments = connection.recv()
        try:
            torch.manual_seed(0)
            connection.send((function(*arguments), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))


class Processes:
    """Two processes of one group; a call runs a function of this file in both and gives what each returns."""

    def __init__(self, folder):
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(RANKS)]
        self.connections = [own for own, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, f"file://{folder}/meeting_place", other), daemon=True)
            for rank, (_, other) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *arguments):
        for connection in self.connections:
            connection.send((function, arguments))
        answers = [connection.recv() for connection in self.connections]
        failures = [failure for _, failure in answers if failure is not None]
        assert not failures, "\n".join(failures)
        return [result for result, _ in answers]

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Started once, since importing torch takes longer than all that they do."""
    running = Processes(tmp_path_factory.mktemp("group"))
    yield running
    running.end()


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        ek.BinaryEngramLinear(20, 70, binary_input=False, dtype=dtype),
        nn.LayerNorm(70),
        ek.BinaryEngramLinear(70, 5, bias=True, engram=ek.StochasticEngram(0.3, 0.5), dtype=dtype),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def steps(model, optimizer, first, last, rank=0, ranks=1):
    """Steps on batches that follow from the step's number alone; of each a rank has its own part."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 20, generator=generator), torch.randint(5, (8,), generator=generator)
        torch.manual_seed(1000 + step)
        own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        nn.functional.cross_entropy(model(x[own]).float(), y[own]).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Weights and state as plain tensors, to compare bit for bit."""
    found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": value.detach().clone() for name, value in state.items()}
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def save(model, optimizer, folder):
    own, state = get_state_dict(model, optimizer)
    dcp.save({"model": own, "optimizer": state}, checkpoint_id=folder)


def load(model, optimizer, folder):
    own, state = get_state_dict(model, optimizer)
    content = {"model": own, "optimizer": state}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])


def fresh(state_dtype, dtype, seed=1, **options):
    model = network(dtype, seed)
    return model, ek.MetaplasticAdam(model.parameters(), weight_bound=3.0, state_dtype=state_dtype, **options)


def _train_and_save(folder, state_dtype, dtype):
    model, optimizer = fresh(state_dtype, dtype, seed=0)
    steps(model, optimizer, 0, 3)
    save(model, optimizer, folder)
    return everything(model, optimizer)


def _load_and_train(folder, state_dtype, dtype):
    model, optimizer = fresh(state_dtype, dtype)
    load(model, optimizer, folder)
    loaded = everything(model, optimizer)
    steps(model, optimizer, 3, 6)
    return loaded, everything(model, optimizer)


@pytest.mark.filterwarnings("ignore:.*torch.distributed")
@pytest.mark.parametrize(("state_dtype", "dtype"), STATES)
@pytest.mark.parametrize("fuse_backward", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_distributed_checkpoint_restores_every_bit(tmp_path, state_dtype, dtype, fuse_backward, begun):
    """Into a fresh optimizer, and into one that has taken other steps."""
    model, optimizer = fresh(state_dtype, dtype, seed=0, fuse_backward=fuse_backward)
    steps(model, optimizer, 0, 3)
    saved = everything(model, optimizer)
    save(model, optimizer, tmp_path)
    assert_equal(everything(model, optimizer), saved)
    other_model, other = fresh(state_dtype, dtype, fuse_backward=fuse_backward)
    if begun:
        steps(other_model, other, 50, 54)
    load(other_model, other, tmp_path)
    assert_equal(everything(other_model, other), saved)
    for own in ((model, optimizer), (other_model, other)):
        steps(*own, 3, 6)
    assert_equal(everything(other_model, other), everything(model, optimizer))


@pytest.fixture
def one_thread():
    """As in the processes: torch's own sums, as of biases and norms, depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*torch.distributed")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("state_dtype", "dtype"), STATES)
def test_a_distributed_checkpoint_serves_another_number_of_processes(processes, tmp_path, state_dtype, dtype):
    saved = _train_and_save(tmp_path / "one", state_dtype, dtype)
    whole = _load_and_train(tmp_path / "one", state_dtype, dtype)
    assert_equal(whole[0], saved)
    for loaded, trained in processes(_load_and_train, tmp_path / "one", state_dtype, dtype):
        assert_equal(loaded, saved)
        assert_equal(trained, whole[1])
    for of_rank in processes(_train_and_save, tmp_path / "two", state_dtype, dtype):
        assert_equal(of_rank, saved)
    loaded, trained = _load_and_train(tmp_path / "two", state_dtype, dtype)
    assert_equal(loaded, saved)
    assert_equal(trained, whole[1])


def _replica(state_dtype, dtype, zero):
    rank = dist.get_rank()
    model = network(dtype, seed=rank)  # DistributedDataParallel gives all the weights of the first
    model[2].engram.first_row = 4 * rank
    replica = DistributedDataParallel(model)
    settings = {"weight_bound": 3.0, "state_dtype": state_dtype}
    if zero:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), ek.MetaplasticAdam, **settings)
    else:
        optimizer = ek.MetaplasticAdam(model.parameters(), **settings)
    before = copy.deepcopy(model.state_dict())
    steps(replica, optimizer, 0, 20, rank, RANKS)
    if zero:
        optimizer.consolidate_state_dict(0)
        return before, {name: value.detach().clone() for name, value in model.state_dict().items()}
    return before, everything(model, optimizer)


@pytest.mark.parametrize(
    ("state_dtype", "dtype", "zero"),
    # ZeroRedundancyOptimizer takes one dtype for all parameters
    [(*state, zero) for state in STATES for zero in (False, True) if not zero or state[1] == torch.float32],
)
def test_replicas_stay_equal_to_the_last_bit(processes, state_dtype, dtype, zero):
    (before, one), (_, other) = processes(_replica, state_dtype, dtype, zero)
    assert_equal(one, other)
    assert all(not torch.equal(one[name], value) for name, value in before.items() if value.dim() == 2)


def _shard(kind, early):
    """The error of an optimizer of a sharded network: where it is made, or where it was made before, at its step."""
    model = network()
    optimizer = ek.MetaplasticAdam(model.parameters()) if early else None
    if kind == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(
                model, device_id=torch.device("cpu"), use_orig_params=kind == "FSDP1 with use_orig_params"
            )
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if optimizer is None:
                optimizer = ek.MetaplasticAdam(model.parameters())
            steps(model, optimizer, 0, 1)
    except Exception as error:
        return type(error).__name__, str(error)
    return "warned", " ".join(str(warning.message) for warning in told)


@pytest.mark.parametrize("kind", ["fully_shard", "FSDP1", "FSDP1 with use_orig_params"])
@pytest.mark.parametrize("early", [False, True])
def test_shards_are_refused_by_name(processes, kind, early):
    for name, said in processes(_shard, kind, early):
        assert ("fully_shard" if kind == "fully_shard" else "FullyShardedDataParallel") in said
        assert "DistributedDataParallel" in said
        if not early:
            assert name == "NotImplementedError"


def samples(count=90):
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(4, (count,), generator=generator)
    return torch.randn(4, 50, generator=generator)[y] + torch.randn(count, 50, generator=generator), y


def ridge():
    return ek.RidgeReadout(50, 4, engram=ek.StochasticEngram(0.3, temperature=0.0))


def _share_moments():
    readout, (x, y) = ridge(), samples()
    readout.observe(x[dist.get_rank() :: RANKS], y[dist.get_rank() :: RANKS])
    alone = readout(x)  # solves for the samples of this process
    for name in ("gram", "counts", "samples"):
        dist.all_reduce(getattr(readout, name))
    return alone, readout(x)


def test_processes_that_add_up_their_moments_have_seen_all_samples(processes):
    readout, (x, y) = ridge(), samples()
    readout.observe(x, y)
    for alone, together in processes(_share_moments):
        assert torch.equal(together, readout(x))
        assert not torch.equal(alone, together)
