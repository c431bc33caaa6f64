"""``python -m tenancy_orm.cli``."""

from . import main

main()
