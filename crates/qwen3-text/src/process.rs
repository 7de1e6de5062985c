//! A chat template rendered in a process of its own.
//!
//! A template comes with a checkpoint, from anybody. It can nest values until the stack overflows,
//! which no program survives, and it can ask the allocator for any amount of memory. The process
//! therefore has limits on memory and stack, and is killed when it takes too long. It stays between
//! renderings, so that one costs little more than in the process of the caller.
//!
//! The process is this program again. A program that uses `ChatTemplate::isolated` calls
//! `serve_templates` first in `main`.

use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::conversation::Conversation;
use crate::error::TemplateError;
use crate::json::Json;
use crate::template::{Compiled, TemplateSource};

/// First argument of the process.
const ARGUMENT: &str = "--render-chat-templates";
/// Variable of the environment that the process has, so that it starts no other.
const VARIABLE: &str = "QWEN3_TEXT_RENDERER";
/// Time for the process to start, on a machine that does much else.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Time to compile a template, or to render a conversation.
const RENDER_TIMEOUT: Duration = Duration::from_millis(1200);
/// Memory of the process beyond what it has when it starts, in bytes.
const MEMORY: u64 = 160 << 20;
/// Stack of the thread that renders, in bytes; a part of the memory.
const STACK: usize = 32 << 20;
/// Largest message between the processes, in bytes.
const MAX_MESSAGE: usize = 64 << 20;

/// Serves templates and exits, if this process was started to render chat templates. Otherwise it
/// returns at once.
pub fn serve_templates() {
    let asked = std::env::args_os().nth(1).is_some_and(|argument| argument == ARGUMENT);
    if asked && std::env::var_os(VARIABLE).is_some() {
        let served = serve();
        std::process::exit(i32::from(served.is_err()));
    }
}

/// Answers requests from standard input until it ends.
fn serve() -> io::Result<()> {
    limit(Resource::Core, 0);
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    if let Some(pages) = pages.split(' ').next().and_then(|pages| pages.parse::<u64>().ok()) {
        limit(Resource::As, pages * rustix::param::page_size() as u64 + MEMORY);
    }
    // This thread goes on reading while the other one renders, so that the process ends as soon as
    // its parent does.
    let (requests, received) = mpsc::channel::<Json>();
    let render = move || -> io::Result<()> {
        let mut template = None;
        for request in received {
            write_message(&mut io::stdout(), &answer(&mut template, &request))?;
        }
        Ok(())
    };
    std::thread::Builder::new().stack_size(STACK).spawn(render)?;
    write_message(&mut io::stdout(), &Json::Null)?;
    let mut input = io::stdin().lock();
    while let Ok(message) = read_message(|buffer| input.read(buffer)) {
        if requests.send(message).is_err() {
            break;
        }
    }
    Ok(())
}

fn limit(resource: Resource, value: u64) {
    let maximum = getrlimit(resource).maximum.map_or(value, |maximum| maximum.min(value));
    // Without the limit, the parent's timeout remains.
    let _ = setrlimit(resource, Rlimit { current: Some(maximum), maximum: Some(maximum) });
}

/// The answer to a request: a text, or an object that holds an error.
fn answer(template: &mut Option<Compiled>, request: &Json) -> Json {
    let result = if let Some(source) = request.get("source") {
        Compiled::new(source_from(source)).map(|compiled| {
            *template = Some(compiled);
            String::new()
        })
    } else {
        match template {
            Some(template) => template.render(&conversation_from(request)),
            None => Err(TemplateError::Process { problem: "no template".to_owned() }),
        }
    };
    let text = |text: &str| Json::String(text.to_owned());
    let error = |kind: &str, name: &str, problem: &str| {
        object([("kind", text(kind)), ("name", text(name)), ("problem", text(problem))])
    };
    match result {
        Ok(rendered) => Json::String(rendered),
        Err(TemplateError::Syntax { name, problem, .. }) => error("syntax", &name, &problem),
        Err(TemplateError::Limit { problem }) => error("limit", "", &problem),
        Err(TemplateError::Render { problem }) => error("render", "", &problem),
        Err(other) => error("process", "", &other.to_string()),
    }
}

fn object<const N: usize>(fields: [(&str, Json); N]) -> Json {
    Json::Object(fields.map(|(name, value)| (name.to_owned(), value)).into_iter().collect())
}

/// Pairs of names and values as an object. A repeated name has its last value, as in a template.
fn pairs<'a, T: 'a>(
    items: impl IntoIterator<Item = &'a (String, T)>,
    value: impl Fn(&T) -> Json,
) -> Json {
    Json::Object(items.into_iter().map(|(name, item)| (name.clone(), value(item))).collect())
}

fn entries(value: Option<&Json>) -> impl Iterator<Item = (String, Json)> {
    let entries = match value {
        Some(Json::Object(entries)) => entries.clone(),
        _ => Default::default(),
    };
    entries.into_iter()
}

fn source_message(source: &TemplateSource) -> Json {
    let text = |text: &String| Json::String(text.clone());
    let source = object([
        ("origin", text(&source.origin)),
        ("templates", pairs(&source.templates, text)),
        ("special_tokens", pairs(&source.special_tokens, text)),
    ]);
    object([("source", source)])
}

fn source_from(message: &Json) -> TemplateSource {
    let texts = |name| {
        let text = |(name, value): (String, Json)| Some((name, value.as_str()?.to_owned()));
        entries(message.get(name)).filter_map(text).collect()
    };
    TemplateSource {
        origin: message.get("origin").and_then(Json::as_str).unwrap_or_default().to_owned(),
        templates: texts("templates"),
        special_tokens: texts("special_tokens"),
    }
}

fn conversation_message(chat: &Conversation) -> Json {
    object([
        ("messages", Json::Array(chat.messages.clone())),
        ("tools", chat.tools.clone().map_or(Json::Null, Json::Array)),
        ("variables", pairs(&chat.variables, Json::clone)),
        ("add_generation_prompt", Json::Bool(chat.add_generation_prompt)),
        ("continue_final_message", Json::Bool(chat.continue_final_message)),
    ])
}

fn conversation_from(message: &Json) -> Conversation {
    let list = |name| match message.get(name) {
        Some(Json::Array(items)) => Some(items.clone()),
        _ => None,
    };
    let flag = |name| message.get(name) == Some(&Json::Bool(true));
    Conversation {
        messages: list("messages").unwrap_or_default(),
        tools: list("tools"),
        variables: entries(message.get("variables")).collect(),
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
    }
}

/// A message is its length in four bytes, then JSON.
fn write_message(out: &mut impl Write, message: &Json) -> io::Result<()> {
    let text = message.to_string();
    let length = u32::try_from(text.len()).map_err(io::Error::other)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn read_message(mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<Json> {
    let mut fill = |bytes: &mut [u8]| {
        let mut at = 0;
        while at < bytes.len() {
            match read(&mut bytes[at..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => at += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    let mut length = [0; 4];
    fill(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(io::Error::other(format!("a message of {length} bytes")));
    }
    let mut bytes = vec![0; length];
    fill(&mut bytes)?;
    let text = String::from_utf8(bytes).map_err(io::Error::other)?;
    Json::parse_deep(&text).map_err(io::Error::other)
}

/// The process that renders one template; it is started again when it was killed.
#[derive(Debug)]
pub(crate) struct RenderProcess {
    source: TemplateSource,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl RenderProcess {
    /// Starts the process and compiles the template there.
    pub(crate) fn start(source: TemplateSource) -> Result<Self, TemplateError> {
        source.check()?;
        let process = Self { source, running: Mutex::new(None) };
        let running = process.launch()?;
        *process.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(running);
        Ok(process)
    }

    pub(crate) fn render(&self, chat: &Conversation) -> Result<String, TemplateError> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut process = match running.take() {
            Some(process) => process,
            None => self.launch()?,
        };
        let result = self.ask(&mut process, &conversation_message(chat), RENDER_TIMEOUT);
        // After a timeout, or when it ended, the process is of no use.
        if !matches!(result, Err(TemplateError::Limit { .. } | TemplateError::Process { .. })) {
            *running = Some(process);
        }
        result
    }

    fn launch(&self) -> Result<Running, TemplateError> {
        let failed = |problem: String| TemplateError::Process { problem };
        if std::env::var_os(VARIABLE).is_some() {
            return Err(failed(format!("{VARIABLE} is set: a renderer starts no other")));
        }
        let program = match cfg!(target_os = "linux") {
            // Also right if the program's file was replaced or deleted.
            true => "/proc/self/exe".into(),
            false => std::env::current_exe().map_err(|error| failed(error.to_string()))?,
        };
        let mut child = Command::new(program)
            .arg(ARGUMENT)
            .env(VARIABLE, "1")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Ctrl-C is for this process. The other one ends with it.
            .process_group(0)
            .spawn()
            .map_err(|error| failed(format!("cannot start: {error}")))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or_else(|| failed("has no pipes".to_owned()))?;
        let mut running = Running { child, input, output };
        let ready = receive(&mut running.output, START_TIMEOUT);
        if !matches!(ready, Ok(Json::Null)) {
            let problem = "does not start; the program must call serve_templates first in main";
            return Err(failed(problem.to_owned()));
        }
        self.ask(&mut running, &source_message(&self.source), RENDER_TIMEOUT)?;
        Ok(running)
    }

    fn ask(
        &self,
        running: &mut Running,
        request: &Json,
        timeout: Duration,
    ) -> Result<String, TemplateError> {
        let sent = write_message(&mut running.input, request);
        let reply = sent.and_then(|()| receive(&mut running.output, timeout));
        let limit = |problem: String| Err(TemplateError::Limit { problem });
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return limit(format!("it takes more than {:.1} s", timeout.as_secs_f64()));
            }
            Err(error) => {
                let _ = running.child.kill();
                let ended = running.child.wait().ok().and_then(|status| status.signal());
                let limits =
                    format!("{} MiB of memory, {} MiB of stack", MEMORY >> 20, STACK >> 20);
                return match ended {
                    Some(signal) => limit(format!("{limits} (signal {signal})")),
                    None => Err(TemplateError::Process { problem: error.to_string() }),
                };
            }
        };
        if let Json::String(text) = reply {
            return Ok(text);
        }
        let text = |name| reply.get(name).and_then(Json::as_str).unwrap_or_default().to_owned();
        let problem = text("problem");
        Err(match text("kind").as_str() {
            "syntax" => {
                let origin = self.source.origin.clone();
                TemplateError::Syntax { origin, name: text("name"), problem }
            }
            "render" => TemplateError::Render { problem },
            "limit" => TemplateError::Limit { problem },
            _ => TemplateError::Process { problem },
        })
    }
}

/// Reads a message that arrives within `timeout`.
fn receive(output: &mut ChildStdout, timeout: Duration) -> io::Result<Json> {
    let end = Instant::now() + timeout;
    read_message(|buffer| {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let left = rustix::event::Timespec::try_from(left).map_err(io::Error::other)?;
            let mut waiting = [PollFd::new(&*output, PollFlags::IN)];
            match poll(&mut waiting, Some(&left)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return output.read(buffer),
                Err(error) => return Err(error.into()),
            }
        }
    })
}
