"""The mechanism of compat.patch, on a toy host."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch

import lobs_native as lobs
from lobs_native.compat.hosts import Difference, Host, Replacement, Tolerance

HOST_FILE = """
import torch

class Pruner:
    def __init__(self, layer):
        self.layer = layer

    def prune(self, share: float, block=4) -> None:
        torch.cuda.synchronize()
        print("the host speaks")
        torch.rand(3)
        self.layer.mul_(1 - share)

def scale(weight, by=2):
    return weight * by
"""
SIGNATURES = {"__init__": ("(self, layer)",), "prune": ("(self, share, block=4)",)}


class OurPruner:
    """A replacement of this package's kind."""

    OPTIONS = ("numerics",)
    numerics = "host"
    off = 0.0

    def __init__(self, layer):
        self.layer = layer

    def prune(self, share, block=4):
        if share > 1:
            raise ValueError("share")
        self.layer.mul_(1 - share).add_(self.off)


def our_scale(weight, by=2):
    return weight * by


def verify_prune(call):
    copy = call.instance.layer.clone()

    def compare(result):
        call.original(copy).prune(*call.args, **call.kwargs)
        return Difference.between(call.instance.layer, copy)

    return compare


def verify_scale(call):
    return lambda result: Difference.between(result, call.original(*call.args, **call.kwargs))


MODULES = ("toyhost", "toys.toyhost")
TOY = Host(
    "toy",
    (
        Replacement(MODULES, "Pruner", OurPruner, SIGNATURES, ("prune",), verify_prune),
        Replacement(MODULES, "scale", our_scale, {"": ("(weight, by=2)",)}, (), verify_scale),
    ),
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with the host, first on the path. Its modules are removed again afterwards."""
    (tmp_path / "toyhost.py").write_text(HOST_FILE)
    (tmp_path / "user_of_toy.py").write_text(
        "from toyhost import *\nfrom toyhost import scale as s\n"
    )
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "toyhost.py").write_text(HOST_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("toyhost", "user_of_toy", "toys.toyhost", "toys"):
        sys.modules.pop(name, None)


def held():
    """The objects that the host's module and its user refer to."""
    host, user = sys.modules["toyhost"], sys.modules["user_of_toy"]
    return host.Pruner, host.scale, user.Pruner, user.scale, user.s


def test_every_reference_is_replaced_and_restored(toy):
    importlib.import_module("user_of_toy")
    before = held()
    with lobs.compat.patch(TOY) as record:
        inside = held()
        assert issubclass(inside[0], OurPruner)
        assert inside[0] is inside[2]
        assert inside[1] is inside[3] is inside[4]
    assert held() == before
    assert set(record.places) == {
        "toyhost.Pruner",
        "user_of_toy.Pruner",
        "toyhost.scale",
        "user_of_toy.scale",
        "user_of_toy.s",
    }


def test_a_host_imported_inside_is_replaced_before_its_importer_sees_it(toy):
    with lobs.compat.patch(TOY):
        user = importlib.import_module("user_of_toy")
        nested = importlib.import_module("toys.toyhost")
        assert issubclass(user.Pruner, OurPruner)
        assert issubclass(nested.Pruner, OurPruner)
        assert type(sys.modules["toyhost"].__spec__.loader).__name__ == "SourceFileLoader"
    assert not issubclass(user.Pruner, OurPruner)
    assert user.Pruner is sys.modules["toyhost"].Pruner
    assert not issubclass(nested.Pruner, OurPruner)


def test_a_reloaded_host_is_replaced_again(toy):
    with lobs.compat.patch(TOY):
        host = importlib.import_module("toyhost")
        host = importlib.reload(host)
        assert issubclass(host.Pruner, OurPruner)
    assert not issubclass(host.Pruner, OurPruner)


def test_everything_is_restored_after_an_exception(toy):
    importlib.import_module("user_of_toy")
    before, path = held(), list(sys.meta_path)
    with pytest.raises(KeyError), lobs.compat.patch(TOY):
        raise KeyError
    assert held() == before
    assert sys.meta_path == path


def test_references_to_our_own_class_are_not_changed(toy):
    """A program that imports our class must not get the host's when a patch ends."""
    user = importlib.import_module("user_of_toy")
    user.ours = OurPruner
    with lobs.compat.patch(TOY):
        pass
    assert user.ours is OurPruner


def test_calls_failures_and_time_are_recorded(toy):
    host = importlib.import_module("toyhost")
    with lobs.compat.patch(TOY) as record:
        pruner = host.Pruner(torch.ones(2, 2))
        pruner.prune(0.5)
        pruner.prune(0.5, block=2)
        with pytest.raises(ValueError, match="share"):
            pruner.prune(2.0)
        assert torch.equal(host.scale(pruner.layer), torch.full((2, 2), 0.5))
    prune, scale = record.lines
    assert (prune.name, prune.calls, prune.failures, prune.verified) == ("Pruner.prune", 3, 1, 0)
    assert (scale.name, scale.calls) == ("scale", 1)
    assert prune.seconds > 0
    assert "toy: Pruner.prune: 3 calls" in str(record)


def test_every_nth_call_is_verified_with_the_host_s_own_code(toy, capsys):
    host = importlib.import_module("toyhost")
    with lobs.compat.patch(TOY, verify=2) as record:
        for _ in range(5):
            host.Pruner(torch.ones(2, 2)).prune(0.5)
        state = torch.get_rng_state()
        host.scale(torch.ones(2, 2))
        host.scale(torch.ones(2, 2))
    assert [(line.verified, line.values, line.mask) for line in record.lines] == [
        (2, 0.0, 0),
        (1, 0.0, 0),
    ]
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), state)


def test_objects_that_outlive_the_block_stay_ours_and_do_not_affect_the_host(toy):
    host = importlib.import_module("toyhost")
    own = host.Pruner
    with lobs.compat.patch(TOY, verify=1) as record:
        pruner = host.Pruner(torch.ones(2, 2))
    pruner.prune(0.5)
    assert torch.equal(pruner.layer, torch.full((2, 2), 0.5))
    assert host.Pruner is own
    assert record.lines[0].verified == 0


def test_the_source_of_a_module_that_is_only_found_can_be_read(toy):
    with lobs.compat.patch(TOY):
        spec = importlib.util.find_spec("toyhost")
        assert "class Pruner" in spec.loader.get_source("toyhost")


def test_a_difference_beyond_the_tolerance_warns(toy, monkeypatch):
    host = importlib.import_module("toyhost")
    monkeypatch.setattr(OurPruner, "off", 0.1)
    with (
        lobs.compat.patch(TOY, verify=1) as record,
        pytest.warns(RuntimeWarning, match=r"Pruner.prune.*2.00e-01 of the values"),
    ):
        host.Pruner(torch.ones(2, 2)).prune(0.5)
    assert record.lines[0].exceeded == 1
    assert "BEYOND TOLERANCE" in str(record)


def test_a_failure_of_the_host_s_own_code_is_only_noted(toy):
    host = importlib.import_module("toyhost")
    host.Pruner.prune = lambda self, share, block=4: 1 / 0
    with (
        lobs.compat.patch(TOY, verify=1) as record,
        pytest.warns(RuntimeWarning, match="ZeroDivisionError"),
    ):
        host.Pruner(torch.ones(2, 2)).prune(0.5)
    assert record.lines[0].verified == 0
    assert "not verified" in str(record)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("block=4", "block=8", r"prune takes \(self, share, block=8\).*leave this host out"),
        ("def prune", "def shrink", "toyhost.Pruner.prune: does not exist"),
        ("by=2", "by=3", r"scale takes \(weight, by=3\)"),
        ("def scale", "def multiply", "has no scale"),
    ],
)
@pytest.mark.parametrize("imported", ["before", "inside"])
def test_another_signature_is_refused_and_nothing_is_replaced(toy, imported, old, new, message):
    (toy / "toyhost.py").write_text(HOST_FILE.replace(old, new))
    if imported == "before":
        host = importlib.import_module("toyhost")
        own = host.Pruner
    with pytest.raises(lobs.HostError, match=message), lobs.compat.patch(TOY):
        importlib.import_module("toyhost")
    if imported == "before":
        assert host.Pruner is own
    else:
        assert "toyhost" not in sys.modules


def test_a_second_patch_of_the_same_host_is_refused(toy):
    host = importlib.import_module("toyhost")
    with lobs.compat.patch(TOY):
        ours = host.Pruner
        with pytest.raises(lobs.ArgumentError, match="already patched"), lobs.compat.patch(TOY):
            pass
        assert host.Pruner is ours


def test_options_reach_the_replacements(toy):
    host = importlib.import_module("toyhost")
    with lobs.compat.patch(TOY, numerics="ours"):
        assert host.Pruner.numerics == "ours"
    assert OurPruner.numerics == "host"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("nohost",), {}, "'nohost'"),
        ((TOY,), {"verify": -1}, "verify: -1"),
        ((TOY,), {"verify": True}, "verify: True"),
        ((TOY,), {"verify": 1, "numerics": "ours"}, "leave one of them out"),
        ((TOY,), {"precision": "high"}, "precision: no such option"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, message):
    with (
        pytest.raises(lobs.ArgumentError, match=message),
        lobs.compat.patch(*arguments, **options),
    ):
        pass


def test_a_host_that_is_not_imported_is_ignored():
    with lobs.compat.patch(TOY) as record:
        pass
    assert "nothing was replaced" in str(record)


def test_values_are_compared_in_rows_of_equal_masks():
    theirs = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 4.0]])
    ours = torch.tensor([[1.0, 0.0, 2.2], [0.0, 1.0, 4.0]])
    found = Difference.between(ours, theirs)
    assert (found.mask, found.entries) == (2, 6)
    assert found.values == pytest.approx(0.05)
    assert Tolerance(values=0.06, mask=0.5).exceeded_by(found) is False
    assert Tolerance(values=0.04, mask=0.5).exceeded_by(found)
    assert Tolerance(values=0.06, mask=0.1).exceeded_by(found)
    assert Tolerance().exceeded_by(Difference.between(ours * torch.nan, theirs))


def test_importing_compat_imports_no_host():
    code = (
        "import sys, lobs_native.compat, lobs_native\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "assert not names & {'transformers', 'llmcompressor', 'modelopt'}, names\n"
        "assert not any(n in sys.modules for n in lobs_native.compat.HOSTS.values())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_known_host_describes_itself():
    for name, module in lobs.compat.HOSTS.items():
        host = importlib.import_module(module).HOST
        assert host.name == name
        assert getattr(lobs.compat, name) is sys.modules[module]
        assert host.replacements
        for replacement in host.replacements:
            assert replacement.modules
            assert replacement.signatures
            assert (replacement.ours.__doc__ or "").strip()


def test_there_is_no_warning_within_the_tolerance(toy):
    host = importlib.import_module("toyhost")
    with warnings.catch_warnings(), lobs.compat.patch(TOY, verify=1):
        warnings.simplefilter("error")
        host.Pruner(torch.ones(2, 2)).prune(0.5)
