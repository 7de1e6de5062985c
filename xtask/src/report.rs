//! `cargo xtask report`: measures this machine and writes `docs/performance.md` (or the page of another machine) with its charts.
//!
//! The page is a list of sections; each is a function of its own file that measures and returns its text and charts.

mod accuracy;
mod analysis;
mod chart;
mod clusters;
mod dense;
mod lab;
mod machine;
mod moe;
mod networks;
mod planning;
mod scaling;

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::workspace;
pub use lab::Lab;

/// A part of the page.
pub struct Section {
    /// Its text, in Markdown, without the heading.
    pub text: String,
    /// Its charts: file names, and SVG. The text links them as `performance/NAME`.
    pub charts: Vec<(String, String)>,
}

/// How a section is called on the command line and on the page, and what measures it.
struct Entry {
    name: &'static str,
    title: &'static str,
    measure: fn(&mut Lab) -> Result<Section>,
}

/// The sections in the order of the page; a new one is added here.
const SECTIONS: [Entry; 8] = [
    Entry { name: "dense", title: "One machine: a dense model", measure: dense::measure },
    Entry { name: "moe", title: "One machine: mixtures of experts", measure: moe::measure },
    Entry { name: "accuracy", title: "Accuracy of the formats", measure: accuracy::measure },
    Entry { name: "analysis", title: "The analysis, repeated", measure: analysis::measure },
    Entry { name: "scaling", title: "More ranks on one machine", measure: scaling::measure },
    Entry { name: "planning", title: "Plan and measurement", measure: planning::measure },
    Entry { name: "clusters", title: "Emulated clusters: the cost of a link", measure: clusters::measure },
    Entry { name: "networks", title: "Emulated clusters: TCP between namespaces", measure: networks::measure },
];

/// The names of the sections.
pub fn names() -> [&'static str; SECTIONS.len()] {
    SECTIONS.map(|section| section.name)
}

/// Measures everything, or only some sections, and writes the page after each: what has been measured is there when a later one fails.
pub fn command(quick: bool, only: &[String], page_name: &str) -> Result<ExitCode> {
    let root = workspace::root();
    let docs = root.join("docs");
    let old = std::fs::read_to_string(docs.join(format!("{page_name}.md"))).unwrap_or_default();
    let mut lab = Lab::open(quick)?;
    let load = machine::load();
    let new_about = || format!("{}\n{}", machine::describe(&root), machine::conditions(quick, load, machine::load()));
    let old_about = match old.split_once(ABOUT).and_then(|(_, rest)| rest.split_once("\n## ")) {
        Some((about, _)) => about.to_owned(),
        None => new_about(),
    };
    let apart = format!("\nMeasured apart from the rest of this page, {}.\n", machine::moment(&root, quick));
    let mut measured = Vec::new();
    for Entry { name, title, measure } in SECTIONS {
        if only.is_empty() || only.iter().any(|wanted| wanted == name) {
            eprintln!("report: section {name}");
            measured.push((title, measure(&mut lab)?));
            let (about, apart) =
                if measured.len() < SECTIONS.len() { (&old_about, &*apart) } else { (&new_about(), "") };
            let titles = SECTIONS.map(|section| section.title);
            write(&docs, page_name, &page(about, &titles, &measured, apart, &old), &measured)?;
        }
    }
    println!("report: docs/{page_name}.md, docs/{page_name}/*.svg");
    Ok(ExitCode::SUCCESS)
}

/// What comes before the description of the machine.
const ABOUT: &str = "# Performance\n\nWritten by `cargo xtask report`; run it again rather than edit this page.\n\n";

/// The text under a heading of an earlier page.
fn kept<'a>(page: &'a str, title: &str) -> Option<&'a str> {
    let (_, rest) = page.split_once(&format!("\n## {title}\n\n"))?;
    Some(rest.split_once("\n## ").map_or(rest, |(text, _)| text))
}

fn write(docs: &Path, name: &str, page: &str, measured: &[(&str, Section)]) -> Result<()> {
    let folder = docs.join(name);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let save = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    for (name, svg) in measured.iter().flat_map(|(_, section)| &section.charts) {
        save(&folder.join(name), svg)?;
    }
    save(&docs.join(format!("{name}.md")), &page.replace("](performance/", &format!("]({name}/")))
}

/// The sections in order: those that were measured, each with the note `apart`, and of the others what the old page has.
fn page(about: &str, titles: &[&str], measured: &[(&str, Section)], apart: &str, old: &str) -> String {
    let mut page = format!("{ABOUT}{}\n", about.trim_end());
    for title in titles {
        let text = match measured.iter().find(|(measured, _)| measured == title) {
            Some((_, section)) => format!("{}{apart}", section.text),
            None => match kept(old, title) {
                Some(text) => text.to_owned(),
                None => continue,
            },
        };
        let _ = write!(page, "\n## {title}\n\n{}\n", text.trim_end());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_its_sections_in_order_and_their_charts_as_files() {
        let docs = tempfile::tempdir().unwrap();
        let section = |title, chart: &str| {
            let text = format!("![x](performance/{chart})\n\n");
            (title, Section { text, charts: vec![(chart.to_owned(), "<svg/>".to_owned())] })
        };
        let titles = ["One", "Two", "Three"];
        let measured = [section("One", "1.svg"), section("Two", "2.svg")];
        let first = page("A machine.\n", &titles, &measured, "", "");
        write(docs.path(), "other", &first, &measured).unwrap();
        let expected = "A machine.\n\n## One\n\n![x](performance/1.svg)\n\n## Two\n\n![x](performance/2.svg)\n";
        let found = std::fs::read_to_string(docs.path().join("other.md")).unwrap();
        let expected = expected.replace("performance", "other");
        assert!(found.starts_with("# Performance\n") && found.ends_with(&expected), "{found}");
        assert_eq!(std::fs::read_to_string(docs.path().join("other/2.svg")).unwrap(), "<svg/>");
        // A section that is not measured again stays as it is; one that is says when.
        assert_eq!(kept(&first, "One"), Some("![x](performance/1.svg)\n"));
        assert_eq!((kept(&first, "Two"), kept(&first, "Three")), (Some("![x](performance/2.svg)\n"), None));
        let second = page("A machine.\n", &titles, &[section("Two", "3.svg")], "Apart.\n", &first);
        let expected =
            "A machine.\n\n## One\n\n![x](performance/1.svg)\n\n## Two\n\n![x](performance/3.svg)\n\nApart.\n";
        assert!(second.ends_with(expected), "{second}");
    }
}
