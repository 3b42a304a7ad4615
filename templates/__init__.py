"""Jinja2 templates of the scripts that slurmfork writes; a package so that an installed wheel has them."""
