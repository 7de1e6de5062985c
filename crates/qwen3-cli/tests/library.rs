//! The example that uses the library crates only: it is short, and gives the recorded answer.

#[path = "../examples/stream.rs"]
#[allow(dead_code)]
mod stream;

use std::sync::Mutex;

#[test]
fn a_program_of_forty_lines_streams_an_answer() {
    assert!(include_str!("../examples/stream.rs").lines().count() <= 40);
    let pieces = Mutex::new(Vec::new());
    stream::answer("What is 17 + 15?", &|text| {
        pieces.lock().unwrap().push(text.to_owned());
        true
    })
    .unwrap();
    let pieces = pieces.into_inner().unwrap();
    assert_eq!(pieces.concat(), "17 + 15 = 32");
    assert!(pieces.len() > 3, "the text came in {pieces:?}");
}
