//! The words of generated problems.
//!
//! Short and few on purpose: a tokenizer of 400 entries must spell them in few tokens. No pronouns, so that any name fits.

/// A way to tell a problem.
pub(super) struct Template {
    /// The question. `{n}` and `{m}` are two names, `{o}` the things in the plural, `{a}` `{b}` `{c}` numbers, and `{ao}` `{bo}`
    /// `{co}` a number of things, in the singular for 1.
    pub text: &'static str,
    /// Starting from `a`, the operations one after the other; each operand is one of the numbers.
    pub steps: &'static [(char, char)],
}

const fn tell(text: &'static str, steps: &'static [(char, char)]) -> Template {
    Template { text, steps }
}

/// Sixteen problems of one step and fourteen of two.
pub(super) const TEMPLATES: [Template; 30] = [
    tell("{n} has {ao}. {m} gives {n} {b} more. How many {o} does {n} have now?", &[('+', 'b')]),
    tell("There are {ao} on the table and {b} on the floor. How many {o} are there?", &[('+', 'b')]),
    tell("{n} has {ao} and {m} has {b}. How many {o} do they have in all?", &[('+', 'b')]),
    tell("{n} finds {ao} today and {b} the next day. How many {o} does {n} find?", &[('+', 'b')]),
    tell("{m} has {b} more {o} than {n}. {n} has {ao}. How many {o} does {m} have?", &[('+', 'b')]),
    tell("{n} buys {ao} on Monday and {b} on Friday. How many {o} is that?", &[('+', 'b')]),
    tell("{n} has {ao} and gives {b} to {m}. How many {o} are left?", &[('-', 'b')]),
    tell("There are {ao} in a box. {n} takes {b}. How many {o} stay in the box?", &[('-', 'b')]),
    tell("{n} had {ao} but lost {b}. How many {o} does {n} still have?", &[('-', 'b')]),
    tell("{n} needs {ao}. {n} has {b}. How many more {o} does {n} need?", &[('-', 'b')]),
    tell("{n} has {ao}. {m} has {b} fewer. How many {o} does {m} have?", &[('-', 'b')]),
    tell("A shop has {ao} and sells {b}. How many {o} are not sold?", &[('-', 'b')]),
    tell("{n} has {b} bags with {ao} in each bag. How many {o} does {n} have?", &[('*', 'b')]),
    tell("Each box holds {ao}. How many {o} are in {b} boxes?", &[('*', 'b')]),
    tell("{n} makes {ao} a day. How many {o} does {n} make in {b} days?", &[('*', 'b')]),
    tell("{m} has {b} times as many {o} as {n}. {n} has {ao}. How many {o} does {m} have?", &[('*', 'b')]),
    tell("{n} has {ao}, finds {b} more and then loses {c}. How many {o} does {n} have now?", &[('+', 'b'), ('-', 'c')]),
    tell(
        "{n} has {ao}. {n} gives {b} to {m} and then buys {c}. How many {o} does {n} have now?",
        &[('-', 'b'), ('+', 'c')],
    ),
    tell("There are {ao} in a bag. {n} takes {b} and {m} takes {c}. How many {o} are left?", &[('-', 'b'), ('-', 'c')]),
    tell("{n} has {ao}. {m} has {b} more than {n}. How many {o} do they have in all?", &[('+', 'b'), ('+', 'a')]),
    tell("{n} buys {b} packs of {ao} and has {c} at home. How many {o} is that?", &[('*', 'b'), ('+', 'c')]),
    tell("{n} fills {b} boxes with {ao} each. Then {m} takes {c}. How many {o} are left?", &[('*', 'b'), ('-', 'c')]),
    tell(
        "{n} gets {ao} on Monday, {b} on Tuesday and {c} on Friday. How many {o} does {n} get?",
        &[('+', 'b'), ('+', 'c')],
    ),
    tell("{n} had {ao} but lost {b} at school and {c} at home. How many {o} are left?", &[('-', 'b'), ('-', 'c')]),
    tell("A shop has {ao}. It sells {b} and then gets {c} more. How many {o} are there?", &[('-', 'b'), ('+', 'c')]),
    tell(
        "{n} has {ao} and {m} has {b}. They give {c} away. How many {o} do they still have?",
        &[('+', 'b'), ('-', 'c')],
    ),
    tell("{n} and {m} each have {ao}. They find {b} more. How many {o} do they have?", &[('+', 'a'), ('+', 'b')]),
    tell(
        "{n} puts {ao} in each of {b} boxes and keeps {c}. How many {o} does {n} have in all?",
        &[('*', 'b'), ('+', 'c')],
    ),
    tell("{n} has {ao}. {m} has {b} fewer. How many {o} do they have in all?", &[('-', 'b'), ('+', 'a')]),
    tell(
        "{n} needs {ao}. {n} has {b} and {m} gives {n} {c}. How many more {o} does {n} need?",
        &[('-', 'b'), ('-', 'c')],
    ),
];

pub(super) const NAMES: [&str; 36] = [
    "Ann", "Tom", "Sam", "Ben", "Mia", "Leo", "Eva", "Max", "Kim", "Dan", "Zoe", "Jim", "Amy", "Bob", "Lia", "Ned",
    "Pam", "Ray", "Sue", "Ted", "Uma", "Val", "Wes", "Ada", "Gus", "Ida", "Jon", "Kai", "Lou", "Meg", "Nia", "Pat",
    "Rob", "Tia", "Ian", "Eli",
];

/// One thing, and several of it.
pub(super) const THINGS: [(&str, &str); 24] = [
    ("apple", "apples"),
    ("pen", "pens"),
    ("egg", "eggs"),
    ("book", "books"),
    ("card", "cards"),
    ("cup", "cups"),
    ("coin", "coins"),
    ("ball", "balls"),
    ("cake", "cakes"),
    ("hat", "hats"),
    ("kite", "kites"),
    ("stone", "stones"),
    ("shell", "shells"),
    ("star", "stars"),
    ("stamp", "stamps"),
    ("pear", "pears"),
    ("plum", "plums"),
    ("nut", "nuts"),
    ("rose", "roses"),
    ("ring", "rings"),
    ("bead", "beads"),
    ("bell", "bells"),
    ("toy", "toys"),
    ("map", "maps"),
];
