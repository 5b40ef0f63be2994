"""Options that are settings say what the settings' fields say."""

from __future__ import annotations

import pytest

from cdm_toolkit.artifacts.settings import Settings
from cdm_toolkit.cli.distill import SETTINGS
from cdm_toolkit.cli.settings_options import RECORDS_OF_A_RUN, fields_of, setting_named
from cdm_toolkit.distill import settings as of_runs
from cdm_toolkit.distill.write_teacher_cache import CacheSettings

RECORDS = [
    *((source, name, getattr(of_runs, name)) for source, name in RECORDS_OF_A_RUN.values()),
    ("distill/write_teacher_cache.py", "CacheSettings", CacheSettings),
]


@pytest.mark.parametrize(("source", "name", "record"), RECORDS)
def test_sources_are_read_as_they_are(source: str, name: str, record: type[Settings]) -> None:
    read = fields_of(source, name)
    assert list(read) == list(record.model_fields)
    for field, of_class in record.model_fields.items():
        assert read[field].help == " ".join((of_class.description or "").replace("`", "").split())
        if of_class.default is not False and isinstance(default := of_class.default, str | int | float):
            assert type(default)(read[field].default) == default


def test_each_option_of_a_run_is_explained() -> None:
    for setting in SETTINGS.values():
        if setting != "preset":
            where, _, name = setting.rpartition(".")
            assert fields_of(*RECORDS_OF_A_RUN[where])[name].help, setting


@pytest.mark.parametrize(
    ("flag", "setting"),
    [
        ("--save-every", "train.save_every"),
        ("--rank", "train.lora.rank"),
        ("--workers", "data.workers"),
        ("--aligner", "teachers.0.aligner"),
        ("--max-edit-distance", "teachers.0.max_edit_distance"),
        ("--shuffle", "data.shuffle"),
        ("--nothing", None),
    ],
)
def test_a_flag_is_found_among_the_settings(flag: str, setting: str | None) -> None:
    assert setting_named(flag) == setting
