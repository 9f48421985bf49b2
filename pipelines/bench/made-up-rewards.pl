# As made-up-rewards.awk, for a resident pipe: awk may wait for a whole block of input, or cut a line where a block ends.
$| = 1;
while (<STDIN>) {
    my $reward = $. * 7 % 5;
    s/\}$/,"reward":$reward}/;
    print;
}
