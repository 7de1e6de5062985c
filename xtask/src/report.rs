//! `cargo xtask report`: measures this machine and writes `docs/performance.md` (or the page of
//! another machine) with its charts.
//!
//! The page is a list of sections; each is a function of its own file that measures and returns its
//! text and charts.

mod accuracy;
mod analysis;
mod chart;
mod clusters;
mod dense;
mod lab;
mod latency;
mod machine;
mod moe;
mod networks;
mod planning;
mod scaling;
mod splits;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
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
const SECTIONS: [Entry; 9] = [
    Entry { name: "dense", title: "One machine: a dense model", measure: dense::measure },
    Entry { name: "moe", title: "One machine: mixtures of experts", measure: moe::measure },
    Entry { name: "accuracy", title: "Accuracy of the formats", measure: accuracy::measure },
    Entry { name: "analysis", title: "The analysis, repeated", measure: analysis::measure },
    Entry { name: "scaling", title: "More ranks on one machine", measure: scaling::measure },
    Entry {
        name: "latency",
        title: "Short times: sums, loading, the first token",
        measure: latency::measure,
    },
    Entry { name: "planning", title: "Plan and measurement", measure: planning::measure },
    Entry {
        name: "clusters",
        title: "Emulated clusters: the cost of a link",
        measure: clusters::measure,
    },
    Entry {
        name: "networks",
        title: "Emulated clusters: TCP between namespaces",
        measure: networks::measure,
    },
];

/// The names of the sections.
pub fn names() -> [&'static str; SECTIONS.len()] {
    SECTIONS.map(|section| section.name)
}

/// Checks the name of a page. All begin with the same word: no other document is overwritten, and
/// none of them is taken for a change of the code.
pub fn page_name(name: &str) -> Result<String, String> {
    let fits =
        |rest: &str| rest.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
    match name.strip_prefix(PAGE) {
        Some(rest) if fits(rest) => Ok(name.to_owned()),
        _ => Err(format!("expected {PAGE} or {PAGE}-NAME")),
    }
}

/// Measures everything, or only some sections, and writes the page after each: what has been
/// measured is there when a later one fails.
pub fn command(quick: bool, only: &[String], page_name: Option<&str>) -> Result<ExitCode> {
    let root = workspace::root();
    // The programs are built from what is there now.
    let commit = machine::commit(&root);
    let (about, apart) = (machine::describe(&root, &commit), machine::moment(&commit, quick));
    let apart = format!("\nMeasured apart from the rest of this page, {apart}.\n");
    let mut lab = Lab::open(quick)?;
    // With MPI too, though it is used later, so that a build that fails costs no measurement.
    lab.has_mpi()?;
    let folder = folder(quick, page_name, lab.folder());
    let page_name = page_name.unwrap_or(PAGE);
    let file = folder.join(format!("{page_name}.md"));
    let old = std::fs::read_to_string(&file).unwrap_or_default();
    let load = machine::load();
    let mut measured = Vec::new();
    for Entry { name, title, measure } in SECTIONS {
        if only.is_empty() || only.iter().any(|wanted| wanted == name) {
            eprintln!("report: section {name}");
            measured.push((title, measure(&mut lab)?));
            let new = format!("{about}\n{}", machine::conditions(quick, load, machine::load()));
            let is_new = |title: &str| measured.iter().any(|(new, _)| *new == title);
            let complete = SECTIONS
                .iter()
                .all(|section| is_new(section.title) || kept(&old, section.title).is_none());
            let (about, apart) = head(&old, complete, &new, &apart);
            let titles = SECTIONS.map(|section| section.title);
            write(&folder, page_name, &page(about, &titles, &measured, apart, &old), &measured)?;
        }
    }
    println!("report: {}, charts in {}", file.display(), folder.join(page_name).display());
    Ok(ExitCode::SUCCESS)
}

/// Where the page goes: what a quick look measured is not for readers, unless it is asked for by
/// name.
fn folder(quick: bool, page_name: Option<&str>, of_lab: &Path) -> PathBuf {
    if quick && page_name.is_none() { of_lab.to_path_buf() } else { workspace::root().join("docs") }
}

/// The head of a page and the note of its new sections. An earlier page keeps its head until
/// everything on it is new.
fn head<'a>(old: &'a str, complete: bool, new: &'a str, apart: &'a str) -> (&'a str, &'a str) {
    match old.split_once(ABOUT).and_then(|(_, rest)| rest.split_once("\n## ")) {
        Some((about, _)) if !complete => (about, apart),
        _ => (new, ""),
    }
}

/// The page where none is named, and how the names of all begin.
const PAGE: &str = "performance";

/// What comes before the description of the machine.
const ABOUT: &str = "# Performance\n\nWritten by `cargo xtask report`; run it again rather than edit this page.\n\n";

/// The text under a heading of an earlier page.
fn kept<'a>(page: &'a str, title: &str) -> Option<&'a str> {
    let (_, rest) = page.split_once(&format!("\n## {title}\n\n"))?;
    Some(rest.split_once("\n## ").map_or(rest, |(text, _)| text))
}

fn write(docs: &Path, name: &str, page: &str, measured: &[(&str, Section)]) -> Result<()> {
    let folder = docs.join(name);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let save = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    for (name, svg) in measured.iter().flat_map(|(_, section)| &section.charts) {
        save(&folder.join(name), svg)?;
    }
    save(&docs.join(format!("{name}.md")), &page.replace("](performance/", &format!("]({name}/")))
}

/// The sections in order: those that were measured, each with the note `apart`, and of the others
/// what the old page has.
fn page(
    about: &str,
    titles: &[&str],
    measured: &[(&str, Section)],
    apart: &str,
    old: &str,
) -> String {
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
    fn pages_are_told_from_other_documents() {
        for name in ["performance", "performance-zen3", "performance_2"] {
            assert_eq!(page_name(name), Ok(name.to_owned()));
        }
        for name in [
            "",
            "architecture",
            "../performance",
            "performance/x",
            "performance.md",
            "my-performance",
        ] {
            assert!(page_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_quick_look_leaves_the_published_page_alone() {
        let (lab, docs) = (Path::new("target/report"), workspace::root().join("docs"));
        assert_eq!(folder(true, None, lab), lab);
        assert_eq!(folder(true, Some("performance-x"), lab), docs);
        assert_eq!(folder(false, None, lab), docs);
    }

    #[test]
    fn a_new_page_has_the_head_of_its_own_run() {
        let old = format!("{ABOUT}old\n\n## One\n\nText.\n");
        assert_eq!(head(&old, false, "new", "apart"), ("old\n", "apart"));
        assert_eq!(head(&old, true, "new", "apart"), ("new", ""));
        assert_eq!(head("", false, "new", "apart"), ("new", ""));
    }

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
        assert_eq!(
            (kept(&first, "Two"), kept(&first, "Three")),
            (Some("![x](performance/2.svg)\n"), None)
        );
        let second = page("A machine.\n", &titles, &[section("Two", "3.svg")], "Apart.\n", &first);
        let expected = "A machine.\n\n## One\n\n![x](performance/1.svg)\n\n## Two\n\n![x](performance/3.svg)\n\nApart.\n";
        assert!(second.ends_with(expected), "{second}");
    }
}
