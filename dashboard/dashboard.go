// Package dashboard shows runs in a browser: curves, peers and what they send
// each other, the steps of each round, functions, faults and cost, live or when
// a run is over. Make a Server with New and have it Serve.
//
// It reads run folders and changes nothing. Without a token it answers only on
// loopback, and only to names of this machine, so that no page of somebody
// else's can read it by way of the browser; with a token only those who know
// it. Nothing in a request becomes a path. What is sent to a page is bounded
// whatever the event files say, and so is how many follow a run at once.
package dashboard

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/netutil"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/bill"
)

//go:embed static
var static embed.FS

const (
	// MinToken is the least length of a token in bytes.
	MinToken       = 16
	maxRuns        = 64
	maxStreams     = 64
	maxConnections = 256
	cookie         = "spirt-dashboard"
)

// Config says what is shown, to whom.
type Config struct {
	// Runs are run folders, or folders that hold some.
	Runs []string
	// Token is what a visitor must know. Empty: nothing, and only this machine
	// is answered.
	Token string
}

// Server serves the dashboard.
type Server struct {
	token   []byte // SHA-256; nil: there is none
	session string // what the cookie of who knows it holds
	runs    []*run
	streams chan struct{}
	http    http.Server
	stop    context.CancelFunc
	ctx     context.Context
}

// New finds the runs. It needs at least one.
func New(cfg Config) (*Server, error) {
	s := &Server{streams: make(chan struct{}, maxStreams)}
	if cfg.Token != "" {
		if len(cfg.Token) < MinToken {
			return nil, fmt.Errorf("a token of %d characters is too short: take %d or more, such as from `openssl rand -hex 16`", len(cfg.Token), MinToken)
		}
		sum := sha256.Sum256([]byte(cfg.Token))
		s.token = sum[:]
		mac := hmac.New(sha256.New, []byte(cfg.Token))
		mac.Write([]byte(cookie))
		s.session = hex.EncodeToString(mac.Sum(nil)) // not the token itself: a cookie goes to every port of this host
	}
	for _, dir := range cfg.Runs {
		found, err := findRuns(dir)
		if err != nil {
			return nil, err
		}
		for _, d := range found {
			if len(s.runs) < maxRuns && !slices.ContainsFunc(s.runs, func(r *run) bool { return r.dir == d }) {
				s.runs = append(s.runs, &run{dir: d, name: s.nameOf(d)})
			}
		}
	}
	if len(s.runs) == 0 {
		return nil, errors.New("no run to show: name a run folder, or a folder that holds some")
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.http = http.Server{Handler: s.Handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10}
	return s, nil
}

// findRuns returns dir if it is a run, else the runs in it, newest first.
func findRuns(dir string) ([]string, error) {
	dir = filepath.Clean(dir)
	isRun := func(d string) bool {
		for _, name := range []string{"events.jsonl", "run.json", "genesis"} {
			if _, err := os.Stat(filepath.Join(d, name)); err == nil {
				return true
			}
		}
		return false
	}
	if isRun(dir) {
		return []string{dir}, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("looking for runs: %w", err)
	}
	var found []string
	for _, e := range slices.Backward(entries) {
		if d := filepath.Join(dir, e.Name()); e.IsDir() && isRun(d) {
			found = append(found, d)
		}
	}
	return found, nil
}

// nameOf returns a name for a run that no other has.
func (s *Server) nameOf(dir string) string {
	base := filepath.Base(dir)
	if abs, err := filepath.Abs(dir); err == nil {
		base = filepath.Base(abs)
	}
	name := base
	for n := 2; s.find(name) != nil; n++ {
		name = fmt.Sprintf("%s (%d)", base, n)
	}
	return name
}

func (s *Server) find(name string) *run {
	for _, r := range s.runs {
		if r.name == name {
			return r
		}
	}
	return nil
}

// Listen listens at host:port. Without a token only loopback is allowed.
func (s *Server) Listen(address string) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen address %q: %w: take host:port, such as 127.0.0.1:8080", address, err)
	}
	if s.token == nil && !loopback(host) {
		return nil, fmt.Errorf("listen address %s: others could reach it: give a token, or listen on 127.0.0.1", address)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return netutil.LimitListener(l, maxConnections), nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// Serve answers at a listener until ctx is done.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() {
		s.stop() // ends the streams
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if s.http.Shutdown(ctx) != nil {
			s.http.Close()
		}
	})
	defer stop()
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Handler answers what a browser asks.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	files, err := fs.Sub(static, "static")
	if err != nil {
		panic(err) // it is embedded
	}
	mux.HandleFunc("GET /api/runs", s.list)
	mux.HandleFunc("GET /api/runs/{name}", s.snapshot)
	mux.HandleFunc("GET /api/runs/{name}/events", s.follow)
	for _, f := range []struct{ path, name, kind string }{
		{"/{$}", "index.html", "text/html; charset=utf-8"}, {"/app.js", "app.js", "text/javascript; charset=utf-8"}, {"/app.css", "app.css", "text/css; charset=utf-8"},
		{"/uPlot.iife.min.js", "uPlot.iife.min.js", "text/javascript; charset=utf-8"}, {"/uPlot.min.css", "uPlot.min.css", "text/css; charset=utf-8"},
		{"/favicon.svg", "favicon.svg", "image/svg+xml"},
	} {
		b, err := fs.ReadFile(files, f.name)
		if err != nil {
			panic(err) // likewise
		}
		mux.HandleFunc("GET "+f.path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Cache-Control", "no-cache")
			send(w, r, f.kind, b)
		})
	}
	return s.guard(mux, files)
}

// guard lets only those in who may see the runs.
func (s *Server) guard(next http.Handler, files fs.FS) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A stream sets times of its own; all else is over soon.
		out := http.NewResponseController(w)
		out.SetReadDeadline(time.Now().Add(10 * time.Second))
		out.SetWriteDeadline(time.Now().Add(time.Minute))
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		if s.token == nil {
			host := r.Host
			if name, _, err := net.SplitHostPort(host); err == nil {
				host = name
			}
			if !loopback(host) { // a name that somebody else made point here
				http.Error(w, "this dashboard answers only at 127.0.0.1 and localhost", http.StatusMisdirectedRequest)
				return
			}
			next.ServeHTTP(w, r)
			return
		}
		switch {
		case r.Method == http.MethodPost && r.URL.Path == "/login":
			r.Body = http.MaxBytesReader(w, r.Body, 4<<10)
			given := r.PostFormValue("token")
			if !s.knows(given) {
				http.Error(w, "that is not the token", http.StatusForbidden)
				return
			}
			http.SetCookie(w, &http.Cookie{Name: cookie, Value: s.session, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: r.TLS != nil})
			http.Redirect(w, r, "/", http.StatusSeeOther)
		case s.admitted(r):
			next.ServeHTTP(w, r)
		case r.URL.Path == "/app.css":
			next.ServeHTTP(w, r)
		case r.Method == http.MethodGet && r.URL.Path == "/":
			b, err := fs.ReadFile(files, "login.html")
			if err != nil {
				panic(err) // it is embedded
			}
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			w.WriteHeader(http.StatusUnauthorized)
			w.Write(b)
		default:
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "this dashboard needs its token: log in at /, or send it as a bearer token", http.StatusUnauthorized)
		}
	})
}

func (s *Server) knows(token string) bool {
	sum := sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(sum[:], s.token) == 1
}

func (s *Server) admitted(r *http.Request) bool {
	if c, err := r.Cookie(cookie); err == nil && subtle.ConstantTimeCompare([]byte(c.Value), []byte(s.session)) == 1 {
		return true
	}
	given, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return ok && s.knows(given)
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) {
	out := make([]Summary, 0, len(s.runs))
	for _, run := range s.runs {
		out = append(out, run.summary())
	}
	sendJSON(w, r, out)
}

func (s *Server) snapshot(w http.ResponseWriter, r *http.Request) {
	run := s.find(r.PathValue("name"))
	if run == nil {
		http.Error(w, "there is no run of that name here", http.StatusNotFound)
		return
	}
	var c cursor
	sendJSON(w, r, run.update(&c))
}

// keepAlive is how often something is sent to whom nothing else is sent.
const keepAlive = 15 * time.Second

// Updates are sent at most so often.
const updateEvery = 200 * time.Millisecond

// follow sends a snapshot and then what changes, as server-sent events.
func (s *Server) follow(w http.ResponseWriter, r *http.Request) {
	run := s.find(r.PathValue("name"))
	if run == nil {
		http.Error(w, "there is no run of that name here", http.StatusNotFound)
		return
	}
	select {
	case s.streams <- struct{}{}:
		defer func() { <-s.streams }()
	default:
		w.Header().Set("Retry-After", "10")
		http.Error(w, "too many follow runs here already", http.StatusServiceUnavailable)
		return
	}
	out := http.NewResponseController(w)
	out.SetReadDeadline(time.Time{}) // nothing more is read; that somebody has gone is noticed
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	tick := time.NewTicker(updateEvery)
	defer tick.Stop()
	var c cursor
	var last time.Time
	for {
		text := []byte(": still here\n\n")
		u := run.update(&c)
		changed := u.Changed
		if changed {
			b, err := json.Marshal(u)
			if err != nil {
				return // a number that JSON has not: it does not come from a Series
			}
			text = fmt.Appendf(nil, "data: %s\n\n", b)
		}
		if now := time.Now(); changed || now.Sub(last) >= keepAlive {
			last = now
			out.SetWriteDeadline(now.Add(30 * time.Second))
			if _, err := w.Write(text); err != nil || out.Flush() != nil {
				return
			}
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		case <-s.ctx.Done():
			return
		}
	}
}

// prices returns the table of a run.
func prices(dir string) *bill.Table {
	if t, err := spirt.PricesOf(dir); err == nil {
		return t
	}
	return bill.Default()
}
