"""Train a student on a teacher's distributions: config, data, teacher, losses, trainer."""
