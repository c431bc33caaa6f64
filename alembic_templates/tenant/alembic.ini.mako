# Migrations of the tenants' databases.

[alembic]
script_location = ${script_location}

# The application's Tenancy or TenancyConfig, as module:attribute. The environment variable TENANCY_APP overrides this;
# without either, the settings are read from TENANCY_* variables, .env, secret files, tenancy.toml and pyproject.toml.
# tenancy_app = myapp.main:tenancy

# The directory that this module is imported from: that of this file.
prepend_sys_path = %(here)s
path_separator = os

# file_template = %%(year)d_%%(month).2d_%%(day).2d_%%(hour).2d%%(minute).2d-%%(rev)s_%%(slug)s
# timezone =
# truncate_slug_length = 40
# version_locations = %(here)s/bar:%(here)s/bat
# recursive_version_locations = false
# output_encoding = utf-8

[post_write_hooks]
# hooks = ruff
# ruff.type = module
# ruff.module = ruff
# ruff.options = check --fix REVISION_SCRIPT_FILENAME

[loggers]
keys = root,sqlalchemy,alembic,tenancy

[handlers]
keys = console

[formatters]
keys = generic

[logger_root]
level = WARNING
handlers = console
qualname =

[logger_sqlalchemy]
level = WARNING
handlers =
qualname = sqlalchemy.engine

[logger_alembic]
level = INFO
handlers =
qualname = alembic

[logger_tenancy]
level = INFO
handlers =
qualname = tenancy_orm

[handler_console]
class = StreamHandler
args = (sys.stderr,)
level = NOTSET
formatter = generic

[formatter_generic]
format = %(levelname)-5.5s [%(name)s] %(message)s
datefmt = %H:%M:%S
