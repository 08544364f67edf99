"""`plan` and `plan --calibrate`: what a job takes, from measurements."""
