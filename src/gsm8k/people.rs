//! The people in generated problems.

use super::draw::Draws;

/// A person or group, with the words that refer to them.
pub(super) struct Person {
    /// The name, or a description.
    pub name: String,
    /// Pronouns: subject, possessive, object.
    pub he: &'static str,
    pub his: &'static str,
    pub him: &'static str,
    /// Whether a verb takes -s.
    pub is_third: bool,
    /// Whether later sentences may repeat the name, also with 's.
    pub has_name: bool,
}

const WOMEN: [&str; 60] = [
    "Ann", "Mia", "Eva", "Kim", "Zoe", "Amy", "Lia", "Pam", "Sue", "Uma", "Val", "Ada", "Ida", "Meg", "Nia", "Tia",
    "Ella", "Anna", "Lucy", "Emma", "Nora", "Rosa", "Ruth", "Sara", "Lena", "Maria", "Julia", "Grace", "Laura", "Olga",
    "Fatima", "Aisha", "Priya", "Mei", "Yuki", "Hana", "Ines", "Carmen", "Sofia", "Chloe", "Alice", "Clara", "Diana",
    "Elena", "Helen", "Irene", "Jane", "Kate", "Linda", "Mary", "Nina", "Olivia", "Paula", "Rita", "Sandra", "Tina",
    "Vera", "Wendy", "Emily", "Lily",
];

const MEN: [&str; 60] = [
    "Tom", "Sam", "Ben", "Leo", "Max", "Dan", "Jim", "Bob", "Ned", "Ray", "Ted", "Wes", "Gus", "Jon", "Kai", "Lou",
    "Rob", "Ian", "Eli", "Pat", "Jack", "John", "Mark", "Paul", "Luke", "Adam", "Alex", "Carl", "Noah", "Omar", "Ali",
    "Ravi", "Wei", "Kenji", "Hugo", "Ivan", "Pedro", "Juan", "Diego", "Marco", "Peter", "David", "James", "Henry",
    "Oscar", "Felix", "Simon", "Victor", "Walter", "George", "Frank", "Erik", "Lars", "Samir", "Tariq", "Kofi",
    "Oliver", "Liam", "Ethan", "Lucas",
];

/// Descriptions of a woman or girl, and of a man or boy.
const FEMALE_ROLES: [&str; 10] = [
    "my sister",
    "a girl",
    "my mom",
    "the teacher",
    "my aunt",
    "a woman",
    "grandma",
    "the nurse",
    "my daughter",
    "the cook",
];
const MALE_ROLES: [&str; 12] = [
    "my brother",
    "a boy",
    "my dad",
    "a farmer",
    "my uncle",
    "a man",
    "grandpa",
    "the baker",
    "my son",
    "the driver",
    "my friend",
    "a student",
];

/// Groups of people.
const GROUPS: [&str; 8] =
    ["the children", "my friends", "the boys", "the girls", "they", "two friends", "my parents", "the kids"];

/// Relatives and friends: each follows a possessive.
const RELATIVES: [&str; 16] = [
    "mom", "dad", "sister", "brother", "friend", "aunt", "uncle", "cousin", "teacher", "neighbor", "grandma",
    "grandpa", "mother", "father", "son", "daughter",
];

impl Person {
    /// Draws the main person of a problem: usually a name, sometimes the speaker or a description.
    pub fn draw(draws: &mut Draws) -> Self {
        match draws.below(20) {
            0..=2 => Self::speaker("I", "my", "me"),
            3 => Self::speaker("we", "our", "us"),
            4 => Self::speaker("you", "your", "you"),
            5 => Self::of(&GROUPS, draws, ("they", "their", "them"), false),
            6 => Self::of(&FEMALE_ROLES, draws, ("she", "her", "her"), true),
            7 => Self::of(&MALE_ROLES, draws, ("he", "his", "him"), true),
            _ => Self::named(draws),
        }
    }

    /// Draws a person whose name differs from `who`'s.
    pub fn other_than(who: &Self, draws: &mut Draws) -> Self {
        loop {
            let other = Self::named(draws);
            if other.name != who.name {
                return other;
            }
        }
    }

    fn named(draws: &mut Draws) -> Self {
        let person = if draws.happens(0.5) {
            Self::of(&WOMEN, draws, ("she", "her", "her"), true)
        } else {
            Self::of(&MEN, draws, ("he", "his", "him"), true)
        };
        Self { has_name: true, ..person }
    }

    fn speaker(he: &'static str, his: &'static str, him: &'static str) -> Self {
        Self { name: he.into(), he, his, him, is_third: false, has_name: false }
    }

    fn of(
        names: &[&str],
        draws: &mut Draws,
        (he, his, him): (&'static str, &'static str, &'static str),
        is_third: bool,
    ) -> Self {
        let name = names[draws.below(names.len())].to_owned();
        Self { name, he, his, him, is_third, has_name: false }
    }
}

/// Draws a relative or friend of `who`, like "his aunt", or a name.
pub(super) fn relative(who: &Person, draws: &mut Draws) -> String {
    if draws.happens(0.3) {
        return Person::other_than(who, draws).name;
    }
    format!("{} {}", who.his, RELATIVES[draws.below(RELATIVES.len())])
}
