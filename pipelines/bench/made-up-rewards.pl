# Random weights earn no rewards: made up ones, different within a group, give every token a gradient. In Perl, because in a resident pipe
# awk may wait for a whole block of input.
$| = 1;
while (<STDIN>) {
    my $reward = $. * 7 % 5;
    s/\}$/,"reward":$reward}/;
    print;
}
