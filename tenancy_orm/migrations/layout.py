"""Creating an application's Alembic directory, from the template of this package."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError

from ..errors import ConfigurationError

_PACKAGE = Path(__file__).parents[1]
_APP = "# tenancy_app = myapp.main:tenancy"


def template_directory() -> Path:
    """Return the directory of the template, for ``alembic init -t <directory>``.

    It is in the package of a wheel, or in the checkout of an editable installation.
    """
    packaged = _PACKAGE / "_alembic_templates"
    return (packaged if packaged.is_dir() else _PACKAGE.parent / "alembic_templates") / "tenant"


def init_directory(directory: str | Path, *, app: str | None = None, config_file: str | Path | None = None) -> bool:
    """Create a migration directory, and an ini file beside it unless it exists.

    Args:
        directory: Where env.py and ``versions`` go. A directory with an env.py is not changed.
        app: ``module:attribute`` of the application's ``Tenancy`` or ``TenancyConfig``, for the ini file.
        config_file: The ini file; ``alembic.ini`` beside the directory where None.

    Returns:
        Whether the directory was created; False if it existed.

    Raises:
        ConfigurationError: the directory has other files in it, or an existing ini file belongs to another directory.
    """
    directory = Path(directory).absolute()
    if (directory / "env.py").is_file():
        return False
    ini = Path(config_file) if config_file is not None else directory.parent / "alembic.ini"
    existed = ini.exists()
    if existed:
        _check(ini, directory)
    try:
        # Alembic prints what it writes; the caller reports that itself
        with contextlib.redirect_stdout(io.StringIO()):
            command.init(_TemplateConfig(ini), str(directory), template="tenant")
    except CommandError as exc:
        raise ConfigurationError(f"the migration directory cannot be created: {exc}") from exc
    if not existed:
        _complete(ini, directory, app)
    return True


class _TemplateConfig(Config):
    """A configuration that names our template's directory, from which Alembic takes it."""

    def get_template_directory(self) -> str:
        return str(template_directory().parent)


def _complete(ini: Path, directory: Path, app: str | None) -> None:
    """Write the application and the directory into the ini file, relative to it, so that the project can be moved."""
    relative = Path(os.path.relpath(directory, ini.absolute().parent)).as_posix()
    text = ini.read_text()
    text = text.replace(f"script_location = {directory.as_posix()}\n", f"script_location = %(here)s/{relative}\n")
    if app is not None:
        text = text.replace(_APP, f"tenancy_app = {app}")
    ini.write_text(text)


def _check(ini: Path, directory: Path) -> None:
    location = Config(ini).get_alembic_option("script_location")
    if location is None or Path(location).resolve() != directory.resolve():
        raise ConfigurationError(
            f"{ini} exists and belongs to another directory; set its script_location to {directory}"
        )
