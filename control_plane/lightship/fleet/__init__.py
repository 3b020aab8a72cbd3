"""The fleet: devices, enrolment CA, assignments, rollouts."""
