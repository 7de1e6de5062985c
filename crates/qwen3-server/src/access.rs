//! Who may use the server: keys with limits, and the `Host` and `Origin` headers that keep web
//! pages of other sites away.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::uri::{Authority, Uri};
use axum::http::{HeaderMap, StatusCode, header};
use subtle::ConstantTimeEq;

use crate::error::ApiError;

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyError {
    /// A line has a word that is no limit.
    #[error("line {line}: found {found:?}, expected name=TEXT, concurrent=N or per-minute=N")]
    Word {
        /// The line, from 1.
        line: usize,
        /// The word.
        found: String,
    },
    /// A key is too short to be secret.
    #[error("line {line}: the key has {found} characters, expected at least {least}")]
    Short {
        /// The line, from 1.
        line: usize,
        /// Characters of the key.
        found: usize,
        /// The smallest number of characters.
        least: usize,
    },
    /// The file has no key.
    #[error("found no key, expected at least one line with a key")]
    Empty,
}

/// The shortest key.
const LEAST_KEY_LENGTH: usize = 8;

/// A key and what its holder may do.
#[derive(Debug)]
pub struct Key {
    digest: [u8; 32],
    /// Names the key in logs; the key itself is never logged.
    pub name: String,
    /// The most requests at the same time.
    pub concurrent: Option<usize>,
    /// The most requests in a minute.
    pub per_minute: Option<u32>,
    active: AtomicUsize,
    /// The start of the current minute, and the requests since then.
    window: Mutex<(Option<Instant>, u32)>,
}

impl Key {
    /// A salt for cached prefixes, so that holders of different keys never share them.
    pub fn salt(&self) -> &[u8] {
        &self.digest
    }

    /// Counts a request, unless a limit is reached. The request ends when the permit is dropped.
    fn admit(self: &Arc<Self>, now: Instant) -> Result<Permit, ApiError> {
        const MINUTE: Duration = Duration::from_secs(60);
        if let Some(limit) = self.per_minute {
            let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
            let (start, count) = &mut *window;
            let age = start.map_or(MINUTE, |start| now.saturating_duration_since(start));
            if age >= MINUTE {
                (*start, *count) = (Some(now), 0);
            } else if *count >= limit {
                return Err(ApiError::too_many(
                    format!("this key allows {limit} requests per minute"),
                    MINUTE - age,
                ));
            }
            *count += 1;
        }
        let active = self.active.fetch_add(1, Ordering::AcqRel) + 1;
        let permit = Permit { key: Arc::clone(self) };
        match self.concurrent {
            Some(limit) if active > limit => Err(ApiError::too_many(
                format!("this key allows {limit} requests at the same time"),
                Duration::from_secs(1),
            )),
            _ => Ok(permit),
        }
    }
}

/// A running request of a key.
#[derive(Debug)]
pub struct Permit {
    key: Arc<Key>,
}

impl Permit {
    /// The key.
    pub fn key(&self) -> &Key {
        &self.key
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.key.active.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The keys of a server; without any, everybody who can connect may use it.
#[derive(Debug, Default)]
pub struct Keys(Vec<Arc<Key>>);

impl Keys {
    /// Parses a key file: a key per line, then limits; `#` starts a comment.
    ///
    /// ```text
    /// 0123456789abcdef name=alice concurrent=4 per-minute=60
    /// ```
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let mut keys = Vec::new();
        for (i, content) in text.lines().enumerate() {
            let line = i + 1;
            let mut words = content.split('#').next().unwrap_or_default().split_whitespace();
            let Some(secret) = words.next() else { continue };
            let found = secret.chars().count();
            if found < LEAST_KEY_LENGTH {
                return Err(KeyError::Short { line, found, least: LEAST_KEY_LENGTH });
            }
            let mut key = Key {
                digest: *blake3::hash(secret.as_bytes()).as_bytes(),
                name: format!("key {}", keys.len() + 1),
                concurrent: None,
                per_minute: None,
                active: AtomicUsize::new(0),
                window: Mutex::new((None, 0)),
            };
            for word in words {
                let wrong = || KeyError::Word { line, found: word.to_owned() };
                match word.split_once('=') {
                    Some(("name", name)) => key.name = name.to_owned(),
                    Some(("concurrent", n)) => {
                        key.concurrent = Some(n.parse().map_err(|_| wrong())?);
                    }
                    Some(("per-minute", n)) => {
                        key.per_minute = Some(n.parse().map_err(|_| wrong())?);
                    }
                    _ => return Err(wrong()),
                }
            }
            keys.push(Arc::new(key));
        }
        if keys.is_empty() { Err(KeyError::Empty) } else { Ok(Self(keys)) }
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The key that a request shows. The time that this takes does not depend on the secrets: keys
    /// are compared as digests, each with all of its bytes.
    fn find(&self, headers: &HeaderMap) -> Option<&Arc<Key>> {
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let bearer = bearer.and_then(|value| {
            let (scheme, secret) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
        });
        let shown = headers.get("x-api-key").and_then(|value| value.to_str().ok()).or(bearer)?;
        let digest = *blake3::hash(shown.as_bytes()).as_bytes();
        let mut found = None;
        for key in &self.0 {
            if bool::from(key.digest.ct_eq(&digest)) {
                found = Some(key);
            }
        }
        found
    }

    /// Checks a request's key and counts the request. Without keys there is no permit.
    pub fn admit(&self, headers: &HeaderMap, now: Instant) -> Result<Option<Permit>, ApiError> {
        if self.is_empty() {
            return Ok(None);
        }
        let key = self.find(headers).ok_or_else(|| {
            let mut error = ApiError::new(
                StatusCode::UNAUTHORIZED,
                "no valid API key; expected the header authorization: Bearer KEY or x-api-key: KEY",
            );
            error.code = Some("invalid_api_key");
            error
        })?;
        key.admit(now).map(Some)
    }
}

/// The `Host` and `Origin` headers that are accepted. A web page that somebody's browser shows can
/// send requests to servers of the same machine; these two headers tell.
#[derive(Clone, Debug, Default)]
pub struct Sites {
    /// Accepts any host: on a UNIX socket, where browsers do not get.
    pub any_host: bool,
    /// Accepts hosts that are addresses: for a server that other machines reach. (An attack by DNS
    /// rebinding needs a name.)
    pub any_address: bool,
    /// Further names, in lower case.
    pub hosts: Vec<String>,
    /// Origins of other sites whose pages may use the server.
    pub origins: Vec<String>,
}

impl Sites {
    /// Checks the headers of a request for `uri`.
    pub fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let forbidden = |message: String| ApiError::new(StatusCode::FORBIDDEN, message);
        let host = match uri.authority() {
            Some(authority) => Some(authority.clone()),
            None => headers.get(header::HOST).and_then(|host| host.to_str().ok()?.parse().ok()),
        };
        if !self.any_host && !host.as_ref().is_some_and(|host| self.knows(host)) {
            return Err(forbidden(format!(
                "host {:?} is not a name of this server; --allowed-host accepts it",
                host.as_ref().map_or("", Authority::as_str)
            )));
        }
        if let Some(origin) = headers.get(header::ORIGIN) {
            let origin = origin.to_str().unwrap_or_default();
            let own = origin.split_once("://").is_some_and(|(_, site)| {
                host.is_some_and(|host| host.as_str().eq_ignore_ascii_case(site))
            });
            let known = self.origins.iter().any(|known| known.eq_ignore_ascii_case(origin));
            if !own && !known {
                return Err(forbidden(format!(
                    "pages of {origin:?} may not use this server; --cors-origin allows it"
                )));
            }
        }
        Ok(())
    }

    fn knows(&self, host: &Authority) -> bool {
        let name = host.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let address: Option<IpAddr> = name.parse().ok();
        name == "localhost"
            || self.hosts.contains(&name)
            || address.is_some_and(|address| self.any_address || address.is_loopback())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_key_file_has_keys_with_limits() {
        let keys = Keys::parse("# ours\n\n0123456789 name=alice concurrent=4\nabcdefghij # b\n");
        let keys = keys.unwrap();
        assert_eq!(keys.0.len(), 2);
        assert_eq!((&*keys.0[0].name, keys.0[0].concurrent), ("alice", Some(4)));
        assert_eq!((&*keys.0[1].name, keys.0[1].per_minute), ("key 2", None));
        assert_ne!(keys.0[0].salt(), keys.0[1].salt());
        assert_eq!(Keys::parse("# none").unwrap_err(), KeyError::Empty);
        let word = KeyError::Word { line: 1, found: "concurrent=x".to_owned() };
        assert_eq!(Keys::parse("0123456789 concurrent=x").unwrap_err(), word);
        let short = KeyError::Short { line: 2, found: 3, least: 8 };
        assert_eq!(Keys::parse("\nabc").unwrap_err(), short);
    }

    #[test]
    fn only_requests_with_a_key_are_admitted() {
        let keys = Keys::parse("0123456789\nabcdefghij").unwrap();
        let admit = |pairs: &[(&'static str, &str)]| {
            let permit = keys.admit(&headers(pairs), Instant::now());
            permit.map(|permit| permit.unwrap().key().name.clone()).map_err(|error| error.status)
        };
        assert_eq!(admit(&[("authorization", "Bearer 0123456789")]), Ok("key 1".to_owned()));
        assert_eq!(admit(&[("authorization", "bearer  abcdefghij")]), Ok("key 2".to_owned()));
        assert_eq!(admit(&[("x-api-key", "abcdefghij")]), Ok("key 2".to_owned()));
        let refused = Err(StatusCode::UNAUTHORIZED);
        for pairs in [
            &[][..],
            &[("authorization", "Bearer 012345678")],
            &[("authorization", "Basic 0123456789")],
            &[("authorization", "0123456789")],
            &[("x-api-key", "")],
        ] {
            assert_eq!(admit(pairs), refused, "{pairs:?}");
        }
        assert!(Keys::default().admit(&headers(&[]), Instant::now()).unwrap().is_none());
    }

    #[test]
    fn a_key_s_limits_hold() {
        let keys = Keys::parse("0123456789 concurrent=2 per-minute=3").unwrap();
        let shown = headers(&[("x-api-key", "0123456789")]);
        let start = Instant::now();
        let admit = |seconds| keys.admit(&shown, start + Duration::from_secs(seconds));
        let (first, second) = (admit(0).unwrap(), admit(1).unwrap());
        let third = admit(2).unwrap_err();
        assert_eq!(third.status, StatusCode::TOO_MANY_REQUESTS);
        assert!(third.message.contains("2 requests at the same time"), "{}", third.message);
        drop((first, second));
        let fourth = admit(20).unwrap_err();
        assert_eq!(fourth.retry_after, Some(Duration::from_secs(40)));
        assert!(fourth.message.contains("3 requests per minute"), "{}", fourth.message);
        assert!(admit(60).is_ok());
    }

    #[test]
    fn foreign_hosts_and_origins_are_refused() {
        let sites = Sites {
            hosts: vec!["model.example".to_owned()],
            origins: vec!["https://app.example".to_owned()],
            ..Sites::default()
        };
        let check = |sites: &Sites, pairs: &[(&'static str, &str)]| {
            sites.check(&Uri::from_static("/v1/models"), &headers(pairs)).is_ok()
        };
        let ok = |pairs: &[(&'static str, &str)]| check(&sites, pairs);
        assert!(ok(&[("host", "localhost:8000")]));
        assert!(ok(&[("host", "127.0.0.1")]));
        assert!(ok(&[("host", "[::1]:8000")]));
        assert!(ok(&[("host", "MODEL.example:443")]));
        assert!(!ok(&[("host", "evil.example:8000")]));
        assert!(!ok(&[("host", "10.0.0.1:8000")]));
        assert!(!ok(&[("host", "localhost.evil.example")]));
        assert!(!ok(&[]));
        let local = ("host", "localhost:8000");
        assert!(ok(&[local, ("origin", "http://localhost:8000")]));
        assert!(ok(&[local, ("origin", "https://app.example")]));
        assert!(!ok(&[local, ("origin", "http://localhost:3000")]));
        assert!(!ok(&[local, ("origin", "null")]));
        assert!(!ok(&[local, ("origin", "https://evil.example")]));
        let public = Sites { any_address: true, ..sites.clone() };
        assert!(check(&public, &[("host", "10.0.0.1:8000")]));
        assert!(!check(&public, &[("host", "evil.example")]));
        let socket = Sites { any_host: true, ..sites.clone() };
        assert!(check(&socket, &[("host", "anything")]) && check(&socket, &[]));
        let http2 = Uri::from_static("https://evil.example/v1/models");
        assert!(sites.check(&http2, &headers(&[])).is_err());
    }
}
