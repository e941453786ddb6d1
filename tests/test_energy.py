"""Energy: its counters on files and a library of the same form, its sums, and those of a run."""

import ctypes
import json
import shutil
import subprocess
import types

import pytest

from lm.compiled import chips
from lm.models import flops
from lm.planning import plan, report
from lm.telemetry import energy, goodput, metrics
from lm.training import loop

pytestmark = pytest.mark.usefixtures("shared_steps")


# ---- counters ----


def zone(root, number, name, now, span=10**9):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{now}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")


def test_rapl_adds_packages_and_their_memory_over_the_end_of_their_range(tmp_path):
    assert energy.rapl_counter(tmp_path) is None
    zone(tmp_path, "0", "package-0", 999_000_000)
    zone(tmp_path, "0:0", "core", 5)  # a part of the package
    zone(tmp_path, "0:1", "dram", 100)
    zone(tmp_path, "1", "psys", 0)  # the package and more
    counter = energy.rapl_counter(tmp_path)
    assert counter is not None and counter() == 0
    zone(tmp_path, "0", "package-0", 2_000_000)  # 3 J later, from zero again
    zone(tmp_path, "0:0", "core", 10**8)
    zone(tmp_path, "1", "psys", 10**8)
    assert counter() == pytest.approx(3.0)
    zone(tmp_path, "0:1", "dram", 500_100)
    assert counter() == pytest.approx(3.5) == counter()


def test_a_counter_that_this_user_may_not_read_is_none(tmp_path):
    zone(tmp_path, "0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # as root reads everything
    assert energy.rapl_counter(tmp_path) is None


NVML = """
static unsigned long long used[3] = {1000, 20000, 300000};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { *d = used + i; return i > 2 ? 2 : 0; }
int nvmlDeviceGetHandleByUUID(const char *u, void **d) { *d = used + u[4] - '0'; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *d, unsigned long long *mj) {
  *mj = *(unsigned long long *)d; return d == used + 2 ? 3 : 0;
}
void spend(int i, unsigned long long mj) { used[i] += mj; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library with NVML's functions, of three GPUs, the last of which has no counter."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(NVML)
    made = str(folder / "libnvml.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, folder / "nvml.c"], check=True)
    return made


def gpus(*ids):
    kind = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}
    return [types.SimpleNamespace(local_hardware_id=i, **kind) for i in ids]


def test_nvml_adds_the_gpus_of_this_process(library, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    counter = energy.nvml_counter(gpus(0, 1), library)
    assert counter is not None and counter() == 0
    spend = ctypes.CDLL(library).spend
    spend(0, ctypes.c_ulonglong(1500)), spend(1, ctypes.c_ulonglong(500))
    assert counter() == pytest.approx(2.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-1")
    second = energy.nvml_counter(gpus(1), library)
    spend(1, ctypes.c_ulonglong(250))
    assert second() == pytest.approx(0.25) and counter() == pytest.approx(2.25)
    assert energy.nvml_counter(gpus(0), library) is None  # NVML error 3
    assert energy.nvml_counter(gpus(7), library) is None
    assert energy.nvml_counter(gpus(0), "no-such-library.so") is None


def test_what_has_a_counter_is_measured_and_the_rest_estimated(library, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "NVML", library)
    four = gpus(0, 1, 0, 1)  # of two processes
    meter = energy.EnergyMeter(four, four[:2])
    ctypes.CDLL(library).spend(0, ctypes.c_ulonglong(7200))
    record = meter.record(10.0)
    assert record == {"joules": {"gpu": pytest.approx(14.4)}, "gco2e_per_kwh": None}
    monkeypatch.setattr(energy, "NVML", "no-such-library.so")
    estimated = energy.EnergyMeter(four, four[:2], gco2e_per_kwh=50.0).record(10.0)
    assert estimated == {"joules": {"device": 4 * 700 * 10.0}, "gco2e_per_kwh": 50.0}
    zone(tmp_path, "0", "package-0", 0)
    both = energy.EnergyMeter(four, four[:2])
    zone(tmp_path, "0", "package-0", 4_000_000)
    assert both.record(1.0)["joules"] == {"cpu": 4.0, "device": 2800.0}
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("")  # it fails
    assert both.record(2.0)["joules"] == {"cpu": 4.0, "device": 5600.0}
    zone(tmp_path, "0", "package-0", 0)
    one = energy.EnergyMeter(four, four, watts_per_device=100.0)
    assert one.record(2.0)["joules"]["device"] == 800.0
    unknown = [types.SimpleNamespace(platform="tpu", device_kind="TPU v5")]
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nowhere")
    record = energy.EnergyMeter(unknown, unknown).record(1.0)
    assert record["joules"] == {} and "unknown" in str(energy.total([record]))


# ---- sums ----


def test_energy_and_emissions_add_up_over_processes():
    one = {"joules": {"gpu": 3.6e6, "cpu": 1.8e6}, "gco2e_per_kwh": 100.0}
    other = {"joules": {"device": 7.2e6}, "gco2e_per_kwh": 300.0}
    found = energy.total([one, other])
    assert found == energy.Energy(measured_kwh=1.5, estimated_kwh=2.0, kg_co2e=0.15 + 0.6)
    assert str(found) == "3.5 kWh (1.5 measured and 2 estimated), 0.75 kg CO2e"
    assert found.figures() == {"kwh_estimated": 3.5, "kg_co2e": 0.75}
    assert str(energy.total([one])) == "1.5 kWh (measured), 0.15 kg CO2e"
    assert energy.total([one]).figures() == {"kwh_measured": 1.5, "kg_co2e": 0.15}
    without = energy.total([other, {**one, "gco2e_per_kwh": None}])
    assert without.kg_co2e is None and "CO2e" not in str(without)


@pytest.mark.parametrize(
    "kind, watts",
    [
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA H100 PCIe", 350),
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA L40S", 350),
        ("TPU v3", 225),
        ("TPU v5", None),
        ("cpu", None),
    ],
)
def test_the_table_is_read_by_the_longest_name(kind, watts):
    assert energy.watts(kind) == watts


def test_every_kind_of_the_table_has_its_peak_flops():
    assert energy.WATTS.keys() - flops.PEAK_FLOPS.keys() == {
        "NVIDIA A100-PCIE-40GB",  # one peak for all A100
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM4",
    }
    assert [chips.CHIPS[name].watts for name in ("v4", "h200", "b200")] == [192, 700, 1000]


# ---- a run and a plan ----


def test_a_run_says_what_it_used_and_how_that_is_known(
    make_config, devices, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nowhere")
    own = {"log.watts_per_device": 50.0, "log.grid_gco2e_per_kwh": 400.0, "train.num_steps": 2}
    config = make_config({**own, "guard.self_check": False, "checkpoint.every": 1})
    config.mesh.data = 1
    loop.train(config, str(tmp_path / "run"), devices[:1])
    found = goodput.read(str(tmp_path / "run"))
    assert found.energy.basis == "estimated"
    assert found.energy.kwh == pytest.approx(50 * found.wall / 3.6e6, rel=0.02)
    assert found.energy.kg_co2e == pytest.approx(found.energy.kwh * 0.4)
    assert f"energy {found.energy}" in capsys.readouterr().out
    last = [r for r in metrics.read(str(tmp_path / "run")) if r["kind"] == "train"][-1]
    assert 0 < last["kwh_estimated"] <= found.energy.kwh
    # it goes on: the energy of both processes, the second of which a counter measures
    zone(tmp_path, "0", "package-0", 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    config.train.num_steps = 4
    config.optimizer.schedule.kind = "constant"
    config.checkpoint.allow_changed = ("train.num_steps", "optimizer.schedule")
    counter = energy.RaplCounter.__call__

    def read(self):
        zone(tmp_path, "0", "package-0", 36_000_000)
        return counter(self)

    monkeypatch.setattr(energy.RaplCounter, "__call__", read)
    loop.train(config, str(tmp_path / "run"), devices[:1])
    again = goodput.read(str(tmp_path / "run")).energy
    assert again.measured_kwh == pytest.approx(1e-5)
    assert again.estimated_kwh == pytest.approx(found.energy.kwh) and again.basis == "both"


def test_without_a_counter_a_cpu_counts_by_its_threads(devices, monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_usable_cpus", lambda: 6)
    assert energy.EnergyMeter(devices, devices).record(10.0)["joules"] == {"device": 240.0}
    given = energy.EnergyMeter(devices, devices, watts_per_device=5.0)
    assert given.record(10.0)["joules"] == {"device": 400.0}


def test_a_plan_estimates_the_energy_of_its_steps(make_config):
    own = {"log.watts_per_device": 100.0, "log.grid_gco2e_per_kwh": 500.0, "mesh.data": 1}
    made = plan.make(make_config({**own, "mesh.fsdp": 2}), "cpu:2")
    assert made.kwh(5) is None and made.num_steps == 10  # a CPU has no published peaks, no times
    tree = json.loads(made.to_json())
    tree["times"] |= {"lower_bound_s": 36.0, "upper_bound_s": 72.0}
    timed = plan.from_json(json.dumps(tree))
    assert timed.kwh(10) == pytest.approx((0.02, 0.04))
    assert json.loads(timed.to_json())["derived"]["kwh"] == pytest.approx([0.02, 0.04])
    text = "0.02 to 0.04 kWh, 0.01 to 0.02 kg CO2e (estimated, at 100 W a device)"
    assert f"energy of 10 steps {text}" in report.page(timed)
    assert "1 to 2 kWh" in report.days(timed, 500 * timed.tokens)
    tree["watts"] = None
    page = report.page(plan.from_json(json.dumps(tree)))
    assert "energy of 10 steps unknown: no published power of cpu:2" in page
