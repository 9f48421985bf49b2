# Random weights earn no rewards: made up ones, different within a group, give every token a gradient.
{ sub(/}$/, ",\"reward\":" (NR * 7 % 5) "}"); print; fflush() }
