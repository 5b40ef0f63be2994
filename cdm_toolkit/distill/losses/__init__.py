"""One small pure function a method: what it reads of the student, and what it makes of that."""
