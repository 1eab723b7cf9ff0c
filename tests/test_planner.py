"""Which mesh and rules are proposed for full-size models, and why."""

import dataclasses
import itertools
import json

import jax
import pytest
from click.testing import CliRunner
from flax import nnx

from convert import registry
from jdit import cli_mesh, sharding, zoo
from jdit.cli import main
from jdit.load import open_variant
from jdit.pipeline import memory
from jdit.pipeline.executor import Stage
from jdit.pipeline.planner import FEW, Why, Work, propose

pytestmark = pytest.mark.slow

GB = 1e9
H100, V5E = 80 * GB, 16 * GB


def proposed(name, devices, limit, **size):
    return open_variant(name).of_size(**size).propose(devices, memory=limit)


def reasons(proposal):
    return {r.why for r in proposal.reasons}


@pytest.mark.parametrize(
    "name, devices, limit, mesh, rules, why",
    [
        ("sd3.5-large", 1, H100, "none", "replicated", {Why.ONE, Why.FITS}),
        ("sd3.5-large", 2, H100, "data=2", "replicated", {Why.GUIDANCE, Why.FITS}),
        ("sd3.5-large", 8, H100, "data=2,sequence=4", "replicated", {Why.GUIDANCE, Why.SEQUENCE, Why.HEADS, Why.FITS}),
        ("sd3.5-large", 1, V5E, "none", "replicated", {Why.ONE, Why.WAITS}),
        ("wan2.1-t2v-14b", 1, V5E, "none", "replicated", {Why.ONE, Why.NO_ROOM}),
        ("sd3.5-large", 8, V5E, "data=2,sequence=4", "fsdp",
         {Why.GUIDANCE, Why.SEQUENCE, Why.HEADS, Why.FSDP, Why.FITS}),
        ("qwen-image", 2, H100, "data=2", "replicated", {Why.GUIDANCE, Why.FITS}),
        ("qwen-image", 8, H100, "data=2,sequence=4", "replicated", {Why.GUIDANCE, Why.SEQUENCE, Why.FITS}),
        ("qwen-image", 8, V5E, "data=2,sequence=4", "fsdp", {Why.GUIDANCE, Why.SEQUENCE, Why.FSDP, Why.FITS}),
        ("wan2.1-t2v-14b", 2, H100, "data=2", "replicated", {Why.GUIDANCE, Why.FITS}),
        ("wan2.1-t2v-14b", 8, H100, "data=2,sequence=4", "replicated", {Why.GUIDANCE, Why.SEQUENCE, Why.FITS}),
        ("wan2.1-t2v-14b", 2, V5E, "data=2", "fsdp", {Why.GUIDANCE, Why.FSDP, Why.NO_ROOM}),
        ("wan2.1-t2v-14b", 8, V5E, "data=2,sequence=4", "fsdp", {Why.GUIDANCE, Why.SEQUENCE, Why.FSDP, Why.FITS}),
        ("wan2.2-animate-14b", 8, H100, "sequence=8", "replicated", {Why.NO_GUIDANCE, Why.SEQUENCE, Why.FITS}),
        # it has learned its guidance, so a step has no halves
        ("hunyuan-video", 1, H100, "none", "replicated", {Why.ONE, Why.FITS}),
        ("hunyuan-video", 2, H100, "sequence=2", "replicated", {Why.NO_GUIDANCE, Why.SEQUENCE, Why.FITS}),
        ("hunyuan-video", 2, V5E, "sequence=2", "fsdp", {Why.NO_GUIDANCE, Why.SEQUENCE, Why.FSDP, Why.WAITS}),
        ("hunyuan-video", 8, V5E, "sequence=8", "fsdp", {Why.NO_GUIDANCE, Why.SEQUENCE, Why.FSDP, Why.FITS}),
    ],
)  # fmt: skip
def test_full_size(name, devices, limit, mesh, rules, why):
    found = proposed(name, devices, limit)
    assert (found.mesh, found.rules) == (mesh, rules)
    assert reasons(found) == why
    assert found.memory.fits == (Why.NO_ROOM not in why)


def none(sizes, rules):
    return memory.plan([Stage("denoise", max, ("transformer",))], {"transformer": 1}, None)


@pytest.mark.parametrize("work", [Work(t, h, g) for t, h, g in itertools.product((64, 4096, 6889), (24, 38), (0, 1))])
def test_what_holds_of_every_proposal(work):
    for devices in range(1, 17):
        found = propose(work, devices, none)
        data, sequence, tensor = (found.sizes.get(axis, 1) for axis in sharding.MESH_AXES)
        assert data * sequence <= devices and data <= 1 + work.guided and tensor == 1
        assert sequence == 1 or work.tokens // sequence >= FEW
        said = reasons(found)
        assert (data * sequence < devices) == (Why.IDLE in said)
        assert (Why.HEADS in said) == (work.heads % sequence > 0) and Why.UNKNOWN in said
    with pytest.raises(ValueError, match="0 devices"):
        propose(work, 0, none)


def test_another_size():
    assert proposed("qwen-image", 16, H100, height=512, width=512).mesh == "data=2,sequence=2"
    with pytest.raises(ValueError, match="1328 or 1344"):
        open_variant("qwen-image").of_size(height=1330)
    with pytest.raises(ValueError, match="qwen-image does not take num_frames"):
        open_variant("qwen-image").of_size(num_frames=81)


def test_bytes_on_a_device_are_those_of_real_meshes():
    cfg = zoo.VARIANTS["wan2.1-t2v-1.3b"].components["transformer"]
    make, rules = (lambda: registry.of_config(cfg).module(cfg, rngs=nnx.Rngs(0))), sharding.Rules.fsdp()
    planned, real = (
        sharding.abstract(make, mesh(data=2, sequence=2, tensor=2), rules)[1]
        for mesh in (sharding.planned_mesh, sharding.make_mesh)
    )
    assert {p: sharding.bytes_a_device(x) for p, x in planned.items()} == {
        p: sharding.bytes_a_device(x) for p, x in real.items()
    }


def test_without_a_mesh_one_device_is_used_and_said(caplog):
    caplog.set_level("INFO", "jdit")
    assert cli_mesh.make(None) is None
    assert "one of 8 devices is used; --mesh spreads over more" in caplog.text
    assert cli_mesh.make({"data": 2, "sequence": 4}).shape == {"data": 2, "sequence": 4, "tensor": 1}


def test_words_of_options_are_those_of_rules():
    assert sorted(cli_mesh.RULES) == sorted(sharding.PRESETS)
    assert cli_mesh.EXCHANGES == sharding.EXCHANGES
    assert cli_mesh.rules_of(None, None) is None and cli_mesh.rules_of("fsdp", None) == "fsdp"
    assert cli_mesh.rules_of(None, "ring") == sharding.Rules(exchange="ring")
    assert cli_mesh.rules_of("fsdp", "gather") == dataclasses.replace(sharding.Rules.fsdp(), exchange="gather")


class TestCommand:
    @staticmethod
    def run(*arguments):
        return CliRunner().invoke(main, ["inspect", *arguments])

    def test_auto(self):
        found = self.run("wan2.1-t2v-14b", "--mesh", "auto", "--devices", "8", "--memory", "80")
        assert found.exit_code == 0
        assert "mesh: data=2,sequence=4, rules replicated" in found.stdout
        assert "sequence=4: 32,760 tokens, 8,190 a device" in found.stdout

    def test_a_mesh_of_more_devices_than_there_are(self):
        where = ("--mesh", "data=2,sequence=32", "--rules", "fsdp", "--frames", "61", "--size", "1280x720", "--json")
        found = self.run("wan2.1-t2v-14b", *where)
        told = json.loads(found.stdout)
        assert told["proposal"] == {"mesh": "data=2,sequence=32", "rules": "fsdp", "reasons": []}
        assert told["memory"]["peak"] < 1.5 * GB and told["memory"]["activations"] > 0
        assert jax.device_count() == 8

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--mesh", "rows=2"], "'rows=2': no axis 'rows'; there are data, sequence, tensor"),
            (["--mesh", "data=two"], "'data=two': data must be a whole number of devices, 1 or more"),
            (["--mesh", "data=0"], "'data=0': data must be a whole number"),
            (["--mesh", "data=2,data=4"], "'data=4': data is there twice"),
            (["--mesh", "data=2", "--rules", "zero"], "'zero' is not one of 'replicated', 'fsdp', 'tensor'"),
            (["--mesh", "data=16", "--devices", "8"], "--mesh needs 16 devices, --devices says 8"),
            (["--mesh", "auto", "--rules", "fsdp"], "--rules fsdp goes with a mesh that is given"),
            (["--devices", "8"], "--devices: goes with --mesh, as --mesh auto"),
        ],
    )
    def test_what_cannot_be_asked(self, arguments, message):
        found = self.run("fluent-image", *arguments)
        assert found.exit_code == 2 and message in found.output
