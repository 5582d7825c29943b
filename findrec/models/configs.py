"""Selects the configuration class of a model by its name: a registered name or an import path.

A name with a colon, such as `my_shop.models:MeanOfItems`, is the import path of a user's model class, whose
attribute `Config` is its configuration class. It needs no registration.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainValidator, SerializeAsAny

from findrec.errors import FindRecError, suggest
from findrec.models.bivrec.config import BiVRecConfig
from findrec.models.config import ModelConfig
from findrec.models.esasrec.config import ESASRecConfig
from findrec.models.findrec.config import FindRecConfig
from findrec.models.findrec_2025.config import FindRec2025Config
from findrec.models.gru4rec.config import GRU4RecConfig
from findrec.models.hdrm.config import HDRMConfig
from findrec.models.hgcf.config import HGCFConfig
from findrec.models.hm4sr.config import HM4SRConfig
from findrec.models.hstu.config import HSTUConfig
from findrec.models.lightgcn.config import LightGCNConfig
from findrec.models.m3rec.config import M3RecConfig
from findrec.models.mamba4rec.config import Mamba4RecConfig
from findrec.models.mfn.config import MFNConfig
from findrec.models.mufasa.config import MufasaConfig
from findrec.models.sasrec.config import SASRecConfig
from findrec.models.unisrec.config import UniSRecConfig
from findrec.models.vbpr.config import VBPRConfig

DEFAULT = "findrec"
TRAINED_BASELINE = "sasrec"  # trained beside the model of a run by default
CONFIGS: dict[str, type[ModelConfig]] = {
    "findrec": FindRecConfig,
    "findrec-2025": FindRec2025Config,
    "esasrec": ESASRecConfig,
    "gru4rec": GRU4RecConfig,
    "hstu": HSTUConfig,
    "lightgcn": LightGCNConfig,
    "mamba4rec": Mamba4RecConfig,
    "hdrm": HDRMConfig,
    "hgcf": HGCFConfig,
    "mufasa": MufasaConfig,
    "hm4sr": HM4SRConfig,
    "bivrec": BiVRecConfig,
    "m3rec": M3RecConfig,
    "mfn": MFNConfig,
    "sasrec": SASRecConfig,
    "unisrec": UniSRecConfig,
    "vbpr": VBPRConfig,
}


def import_object(path: str, what: str) -> Any:
    """Import `module:name`, the value of the key `what`; raises `FindRecError` if it does not exist."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # of the path, or of the user's module
        raise FindRecError(
            f"{what}={path!r}: cannot import {module_name!r} ({type(error).__name__}: {error}). "
            "The module must be installed, or be in a folder of PYTHONPATH, on every machine of the run"
        ) from error
    if not hasattr(module, name):
        raise FindRecError(f"{what}={path!r}: {module_name} has no {name!r}{suggest(name, dir(module))}")
    return getattr(module, name)


def config_class(name: object) -> type[ModelConfig]:
    """The configuration class for `model.name`; raises `ValueError` for an unknown name."""
    if isinstance(name, str) and ":" in name:
        config = getattr(import_object(name, "model.name"), "Config", None)
        if not (isinstance(config, type) and issubclass(config, ModelConfig)):
            raise ValueError(
                f"{name} has no attribute `Config` that is a subclass of findrec.models.config.ModelConfig"
            )
        return _with_implementation(config, name)
    if not isinstance(name, str) or name not in CONFIGS:
        raise ValueError(
            f"model.name must be one of {', '.join(map(repr, CONFIGS))}, or the import path (module:Class) "
            f"of your model class, not {name!r}{suggest(str(name), CONFIGS)}"
        )
    return CONFIGS[name]


_USER_CONFIGS: dict[tuple[type[ModelConfig], str], type[ModelConfig]] = {}


def _with_implementation(config: type[ModelConfig], path: str) -> type[ModelConfig]:
    """A subclass of `config` whose `implementation` is `path`; the same one in every call."""
    if (config, path) not in _USER_CONFIGS:
        members = {"implementation": path, "__module__": config.__module__, "__doc__": config.__doc__}
        _USER_CONFIGS[config, path] = type(config.__name__, (config,), members)
    return _USER_CONFIGS[config, path]


def choose_model(given: object) -> ModelConfig:
    """Validate `given` as the class selected by its `name`; a string is a name with defaults."""
    if isinstance(given, ModelConfig):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise ValueError("a model must be a name or a mapping with the key `name`")
    return config_class(given.get("name", DEFAULT)).model_validate(dict(given))


# A union discriminated by `name` that also accepts unregistered classes.
AnyModel = Annotated[SerializeAsAny[ModelConfig], PlainValidator(choose_model)]
