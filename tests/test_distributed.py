"""Several processes: replicas, shards and checkpoints that equal one process's, and counts that add up."""

import copy
import json
import multiprocessing
import subprocess
import sys
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
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import engram_kernels as ek
from engram_kernels import cli, continual, hidden_weight
from engram_kernels.continual.checkpoint import Checkpoint

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
        own = slice(rank, None, ranks)  # as DistributedSampler shares a batch out
        nn.functional.cross_entropy(model(x[own]).float(), y[own]).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Weights and state as plain tensors, to compare bit for bit."""
    found = dict(model.state_dict())
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": value for name, value in state.items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


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


def fresh(state_dtype, dtype, seed=1, sharded=False, **options):
    model = network(dtype, seed)
    model[2].engram.first_row = 0  # every process trains on the whole batch
    if sharded:
        shard(model)
    return model, ek.MetaplasticAdam(model.parameters(), weight_bound=3.0, state_dtype=state_dtype, **options)


def shard(model):
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in (*model, model):  # fully_shard wants one dtype in what it gathers together
        fully_shard(part, mesh=mesh)


def _train_and_save(folder, state_dtype, dtype, sharded=False):
    model, optimizer = fresh(state_dtype, dtype, seed=0, sharded=sharded)
    steps(model, optimizer, 0, 3)
    save(model, optimizer, folder)
    return everything(model, optimizer)


def _load_and_train(folder, state_dtype, dtype, sharded=False):
    model, optimizer = fresh(state_dtype, dtype, sharded=sharded)
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
@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "shards"])
def test_a_distributed_checkpoint_serves_another_number_of_processes(processes, tmp_path, state_dtype, dtype, sharded):
    """Saved by one and gone on from by two, as replicas or in shards, and the other way round."""
    saved = _train_and_save(tmp_path / "one", state_dtype, dtype)
    whole = _load_and_train(tmp_path / "one", state_dtype, dtype)
    assert_equal(whole[0], saved)
    for loaded, trained in processes(_load_and_train, tmp_path / "one", state_dtype, dtype, sharded):
        assert_equal(loaded, saved)
        assert_equal(trained, whole[1])
    for of_rank in processes(_train_and_save, tmp_path / "two", state_dtype, dtype, sharded):
        assert_equal(of_rank, saved)
    loaded, trained = _load_and_train(tmp_path / "two", state_dtype, dtype)
    assert_equal(loaded, saved)
    assert_equal(trained, whole[1])


def _replica(state_dtype, dtype, zero):
    rank = dist.get_rank()
    model = network(dtype, seed=rank)  # DistributedDataParallel gives all the weights of the first
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


def _share(ranks, state_dtype, dtype, kind):
    """Weights after steps in which each of the processes has its share of the batch."""
    rank = dist.get_rank() if ranks > 1 else 0
    model = network(dtype)
    trained = model
    if kind == "replicas":
        trained = DistributedDataParallel(model)
    elif kind == "shards":
        shard(model)
    optimizer = ek.MetaplasticAdam(model.parameters(), weight_bound=1.5, state_dtype=state_dtype)
    steps(trained, optimizer, 0, 8, rank, ranks)
    return everything(model, optimizer)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["replicas", "shards"])
@pytest.mark.parametrize(("state_dtype", "dtype"), STATES)
def test_processes_that_share_a_batch_do_what_one_does(processes, state_dtype, dtype, kind):
    """But for the order in which gradients are summed, since a sample's engram is that of its number in the batch."""
    whole = _share(1, state_dtype, dtype, "whole")
    for shared in processes(_share, RANKS, state_dtype, dtype, kind):
        assert shared.keys() == whole.keys()
        for name, value in whole.items():
            assert shared[name].dtype == value.dtype
            if value.dtype == torch.float32 and value.numel() > 1 and "scale" not in name:
                assert ((shared[name] - value).abs() > 1e-4).float().mean() < 0.01, name
        for name in ("0.weight", "2.weight"):
            assert shared[name].abs().max() <= 1.5
            assert ((shared[name].float() - whole[name].float()).abs() > 0.02).float().mean() < 0.01, name


def _rows(kind):
    engram = ek.BernoulliEngram(0.3) if kind == "bernoulli" else ek.StochasticEngram(0.3, 0.5)
    x = torch.randn(9, 100, generator=torch.Generator().manual_seed(1))
    rank, size = (dist.get_rank(), RANKS) if dist.is_initialized() else (0, 1)
    torch.manual_seed(3)
    return engram(x[rank::size]).gate_bits


@pytest.mark.parametrize("kind", ["bernoulli", "top k"])
def test_the_engram_of_a_sample_is_the_same_in_whichever_process_it_is(processes, kind):
    whole = _rows(kind)
    for rank, gate_bits in enumerate(processes(_rows, kind)):
        assert torch.equal(gate_bits, whole[rank::RANKS])


class Odd(nn.Module):
    """Layers of one output, of which the second process gets no row, and an idle one, of which none gets a gradient."""

    def __init__(self):
        super().__init__()
        self.hidden = ek.BinaryEngramLinear(33, 129)
        self.one = ek.BinaryEngramLinear(129, 1)
        self.idle = ek.BinaryEngramLinear(4, 3)

    def forward(self, x):
        return self.one(self.hidden(x))


def _odd(sharded, state_dtype, mesh):
    torch.manual_seed(0)
    model = Odd()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("replicas", "shards")[-len(mesh) :]))
    optimizer = ek.MetaplasticAdam(model.parameters(), state_dtype=state_dtype, weight_decay=0.01)
    for step in range(3):
        x = torch.randn(6, 33, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return everything(model, optimizer)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mesh", [(2,), (2, 1), (1, 2)], ids=["FSDP", "replicas of one shard", "one replica of shards"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_shards_take_the_steps_of_the_whole_to_the_last_bit(processes, state_dtype, mesh):
    whole = _odd(False, state_dtype, None)
    for shards in processes(_odd, True, state_dtype, mesh):
        assert_equal(shards, whole)


def _refused(kind, early):
    """The error of an optimizer of a sharded network: where it is made, or where it was made before, at its step."""
    model = network()
    options = {"fuse_backward": kind == "fully_shard, fused"}
    optimizer = ek.MetaplasticAdam(model.parameters(), **options) if early else None
    if kind.startswith("fully_shard"):
        columns = (lambda weight: Shard(weight.dim() - 1)) if kind == "fully_shard by columns" else None
        if columns:
            model = ek.BinaryEngramLinear(20, 70, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), shard_placement_fn=columns)
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
                optimizer = ek.MetaplasticAdam(model.parameters(), **options)
            steps(model, optimizer, 0, 1)
    except Exception as error:
        return type(error).__name__, str(error)
    return "warned", " ".join(str(warning.message) for warning in told)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("FSDP1", "FullyShardedDataParallel"),
        ("FSDP1 with use_orig_params", "FullyShardedDataParallel"),
        ("fully_shard by columns", "a DTensor of parts of rows"),
        ("fully_shard, fused", "fuse_backward: expected False"),
    ],
)
def test_shards_that_cannot_be_updated_are_refused_by_name(processes, kind, said):
    for name, message in processes(_refused, kind, False):
        assert name == "NotImplementedError" and said in message


@pytest.mark.parametrize("kind", ["fully_shard", "FSDP1", "FSDP1 with use_orig_params"])
def test_an_optimizer_made_before_the_shards_says_so(processes, kind):
    for _, message in processes(_refused, kind, True):
        assert ("fully_shard" if kind == "fully_shard" else "FullyShardedDataParallel") in message


def _copies():
    model = network()
    shard(model)
    optimizer = ek.MetaplasticAdam(model.parameters())
    assert optimizer._check_updatable(model[2].weight) is None
    model.to(torch.float32)
    return [hidden_weight.is_hidden_weight(parameter) for parameter in model.parameters()]


def test_the_shards_of_hidden_weights_are_known_from_others(processes):
    for known in processes(_copies):
        assert known == [True, False, False, False, True, False]


def samples(count=90):
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(4, (count,), generator=generator)
    return torch.randn(4, 50, generator=generator)[y] + torch.randn(count, 50, generator=generator), y


def ridge():
    return ek.RidgeReadout(50, 4, engram=ek.StochasticEngram(0.3, temperature=0.0))


def prototype():
    return ek.PrototypeReadout(50, 4, engram=ek.StochasticEngram(0.3, temperature=0.0))


def in_a_network():
    torch.manual_seed(5)
    model = ek.EngramMLP((50, 64, 4), readout="ridge", encode=False)
    return model


READOUTS = {"ridge": ridge, "prototype": prototype, "network": in_a_network}


def _count_in_parts(kind):
    """What the merged read-out says after each of two parts, and the process's own."""
    model, (x, y) = READOUTS[kind](), samples()
    said = []
    for part in (slice(None, 40), slice(40, None)):
        model.observe(x[part][dist.get_rank() :: RANKS], y[part][dist.get_rank() :: RANKS])
        said.append(ek.merged_counts(model)(x))
    return said, model(x)


@pytest.mark.parametrize("kind", READOUTS)
def test_merged_counts_are_those_of_one_process(processes, kind):
    model, (x, y) = READOUTS[kind](), samples()
    expected = []
    for part in (slice(None, 40), slice(40, None)):
        model.observe(x[part], y[part])
        expected.append(model(x))
    for said, alone in processes(_count_in_parts, kind):
        assert all(torch.equal(one, other) for one, other in zip(said, expected, strict=True))
        assert not torch.equal(alone, expected[1])


def _count_apart(difference):
    rank = dist.get_rank()
    torch.manual_seed(rank if difference == "weights" else 0)
    model = ek.EngramMLP((50, 64, 4), readout="ridge", engram=0.2 if difference == "rate" and rank else 0.1)
    if difference == "encoding":
        model.observe(samples()[0][rank::RANKS], samples()[1][rank::RANKS])
    if difference == "too many" and rank:
        model.readout.samples += 2**29
    if difference == "nothing counted":
        model = nn.Linear(2, 2)
    try:
        ek.merged_counts(model)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("weights", "layers.0.weight: expected the same in all processes, got another in process 1 than in 0"),
        ("encoding", "encoding.mean: expected the same"),
        ("rate", "settings of RidgeReadout 0: expected the same"),
        ("too many", "samples: expected at most 2**31 - 1 of all processes, got 2147483648"),
        ("nothing counted", "model: expected a PrototypeReadout or RidgeReadout in it, got none in Linear"),
    ],
)
def test_counts_that_do_not_belong_together_are_not_merged(processes, difference, message):
    for said in processes(_count_apart, difference):
        assert said is not None and message in said


def test_merging_needs_a_process_group():
    with pytest.raises(RuntimeError, match="merged_counts: expected a process group"):
        ek.merged_counts(ridge())


# ---- the training loop


def _run(folder, method, options, resume=False):
    """The accuracies, and the tensors of the model, of a small run; every process is given the same arguments."""
    torch.set_num_threads(1)
    checkpoint = None if folder is None else Checkpoint(folder, {}, resume=resume)
    trained, result = continual.training.run(
        continual.load("digits"), scenario="permuted", tasks=3, samples_per_task=97,
        method=method, hidden=(256,), epochs=2, batch_size=48,
        checkpoint=checkpoint, **options,
    )  # fmt: skip
    return result.accuracy_matrix, {name: value.clone() for name, value in trained.model.state_dict().items()}


RUNS = {
    "dendritic": ("engram", {}),
    "ridge": ("engram", {"readout": "ridge"}),
    "prototype": ("engram", {"readout": "prototype"}),
    "metaplastic": ("mbnn", {}),
    "consolidation": ("ewc", {}),
    "replay": ("replay", {}),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_several_processes_is_that_of_one(processes, kind):
    """Batches of 48 and a last one of 1, of which the second process has no sample."""
    method, options = RUNS[kind]
    matrix, tensors = _run(None, method, options)
    for other_matrix, others in processes(_run, None, method, options):
        assert others.keys() == tensors.keys()
        for name, value in tensors.items():
            if kind in ("ridge", "prototype"):
                assert torch.equal(others[name], value), name
            else:
                assert ((others[name] - value).abs() > 1e-3).float().mean() < 0.02, name
        assert (torch.tensor(other_matrix) - torch.tensor(matrix)).abs().max() < 0.03


def _go_on(folder, method, options):
    whole = _run(folder, method, options)
    dist.barrier()  # the first process has written all that it writes
    return whole, _run(folder, method, options, resume=True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["dendritic", "ridge"])
def test_several_processes_go_on_from_a_checkpoint(processes, tmp_path, kind):
    """From that of the last task but one, which a run leaves; to the last bit."""
    for (matrix, tensors), (resumed_matrix, resumed) in processes(_go_on, tmp_path, *RUNS[kind]):
        assert resumed_matrix == matrix
        assert_equal(resumed, tensors)


def _fused():
    try:
        _run(None, "mbnn", {"fuse_backward": True})
    except ValueError as error:
        return str(error)


def test_processes_cannot_share_what_the_backward_pass_consumes(processes):
    for said in processes(_fused):
        assert "fuse_backward: expected False with several processes" in said


@pytest.mark.slow
def test_the_command_line_under_torchrun_writes_once(tmp_path):
    options = ["train", "--quiet", "--method", "mbnn", "--hidden", "64", "--epochs", "1", "--output", str(tmp_path)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "engram_kernels.cli",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes share each batch") == 1
    assert done.stdout.count(f"wrote {tmp_path / 'metrics.json'}") == 1
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["completed"]


def test_comparisons_are_no_work_for_torchrun(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["compare", "--output", str(tmp_path / "out")]) == 2
    assert "compare: expected one process, got 3 of torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
