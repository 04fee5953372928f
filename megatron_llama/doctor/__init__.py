"""What is right and what is wrong with an installation, a job and a file system: the checks of tools/doctor.py."""
