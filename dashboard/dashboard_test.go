package dashboard

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

const token = "0123456789abcdef-token"

// nasty is what a hostile peer might say.
const nasty = `</script><img src=x onerror="document.title='owned'"><b>bold`

// synthetic makes the folder of a run of so many rounds and peers.
func synthetic(t testing.TB, name string, rounds, peers int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	out := json.NewEncoder(&b)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	write := func(e events.Event) {
		e.Time = at
		if err := out.Encode(e); err != nil {
			t.Fatal(err)
		}
	}
	write(events.Event{Event: "run", State: "started"})
	for r := 1; r <= rounds; r++ {
		at = at.Add(20 * time.Millisecond)
		for p := 1; p <= peers; p++ {
			write(roundOf(p, r, peers))
		}
		if r%25 == 0 {
			accuracy, loss := 1-1/float64(r), 3/float64(r)
			write(events.Event{Event: "validation", Peer: 1, Round: uint64(r), Accuracy: &accuracy, Loss: &loss})
		}
	}
	write(events.Event{Event: "warning", Peer: 1, About: 2, Cause: events.CauseRefused, Message: nasty})
	if err := os.WriteFile(filepath.Join(dir, "events.jsonl"), b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func roundOf(p, r, peers int) events.Event {
	loss := 2/(1+float64(r)/50) + float64(p)/100
	e := events.Event{
		Event: "round", Peer: p, Round: uint64(r), Slot: uint64(r), Loss: &loss, Seconds: .02, Samples: 64, Members: []int{1, 2}, Model: "ab",
		Steps: []events.Step{{Step: "compute", At: 0, MS: 9}, {Step: "gather", At: 9, MS: 6}, {Step: "apply", At: 15, MS: 5}},
		Spent: &events.Spent{Usage: bill.Usage{PeerMillis: 20, BytesOut: 1000}, CostUSD: 1000},
	}
	for q := 1; q <= peers; q++ {
		if q != p {
			e.Traffic = append(e.Traffic, events.Traffic{Peer: q, In: 1000, Out: 1000 * int64(p)})
		}
	}
	return e
}

func add(t testing.TB, dir, text string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "events.jsonl"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	f.Close()
}

func line(t testing.TB, e events.Event) string {
	t.Helper()
	e.Time = time.Date(2026, 1, 2, 4, 0, 0, 0, time.UTC)
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return string(b) + "\n"
}

func serve(t testing.TB, cfg Config) (*Server, *httptest.Server) {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(s.Handler())
	t.Cleanup(func() { s.stop(); h.Close() })
	return s, h
}

func get(t testing.TB, url string, change func(*http.Request)) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(r)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(b)
}

// All that a page loads at first is small, and nothing in it is from elsewhere.
func TestPage(t *testing.T) {
	_, h := serve(t, Config{Runs: []string{synthetic(t, "a", 10, 2)}})
	total := 0
	for _, path := range []string{"/", "/app.js", "/app.css", "/uPlot.iife.min.js", "/uPlot.min.css", "/favicon.svg", "/api/runs", "/api/runs/a"} {
		res, body := get(t, h.URL+path, nil)
		if res.StatusCode != http.StatusOK {
			t.Errorf("%s: %s", path, res.Status)
		}
		if csp := res.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || strings.Contains(csp, "unsafe") {
			t.Errorf("%s: policy %q", path, csp)
		}
		total += len(body)
	}
	if total > 300_000 {
		t.Errorf("the page has %d bytes", total)
	}
	t.Logf("%d bytes", total)
	for _, path := range []string{"/static/", "/login.html", "/../dashboard.go", "/api/runs/..%2f..%2fetc%2fpasswd", "/api/runs/b/events", "/api"} {
		if res, _ := get(t, h.URL+path, nil); res.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, res.Status)
		}
	}
	if res, err := http.Post(h.URL+"/api/runs", "text/plain", strings.NewReader("x")); err != nil || res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %v, %v", res.Status, err)
	}
}

// Without a token only names of this machine are answered; with one nobody who
// does not know it.
func TestAccess(t *testing.T) {
	dir := synthetic(t, "a", 1, 1)
	open, h := serve(t, Config{Runs: []string{dir}})
	for host, want := range map[string]int{"localhost:80": 200, "127.0.0.1": 200, "[::1]:9": 200, "evil.example": 421, "127.0.0.1.evil.example:80": 421, "10.0.0.1": 421} {
		if res, _ := get(t, h.URL+"/api/runs", func(r *http.Request) { r.Host = host }); res.StatusCode != want {
			t.Errorf("host %s: %s", host, res.Status)
		}
	}
	for _, at := range []string{"0.0.0.0:0", ":0", "192.0.2.1:0", "example.com:0"} {
		if l, err := open.Listen(at); err == nil || !strings.Contains(err.Error(), "give a token") {
			t.Errorf("%s: %v, %v", at, l, err)
		}
	}
	l, err := open.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := New(Config{Runs: []string{dir}, Token: "short"}); err == nil || !strings.Contains(err.Error(), "too short") {
		t.Errorf("a short token: %v", err)
	}

	_, h = serve(t, Config{Runs: []string{dir}, Token: token})
	if res, body := get(t, h.URL+"/", nil); res.StatusCode != http.StatusUnauthorized || !strings.Contains(body, `type="password"`) {
		t.Errorf("%s: %s", res.Status, body)
	}
	for _, path := range []string{"/api/runs", "/api/runs/a", "/api/runs/a/events", "/app.js"} {
		for name, change := range map[string]func(*http.Request){
			"nothing": nil,
			"bearer":  func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token+"x") },
			"cookie":  func(r *http.Request) { r.AddCookie(&http.Cookie{Name: cookie, Value: "x"}) },
			"query":   func(r *http.Request) { r.URL.RawQuery = "token=" + token },
		} {
			if res, _ := get(t, h.URL+path, change); res.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s with %s: %s", path, name, res.Status)
			}
		}
	}
	if res, _ := get(t, h.URL+"/api/runs", func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }); res.StatusCode != http.StatusOK {
		t.Error(res.Status)
	}
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	if res, err := client.PostForm(h.URL+"/login", url.Values{"token": {"wrong"}}); err != nil || res.StatusCode != http.StatusForbidden || len(res.Cookies()) != 0 {
		t.Errorf("%v, %v", res, err)
	}
	res, err := client.PostForm(h.URL+"/login", url.Values{"token": {token}})
	if err != nil || res.StatusCode != http.StatusSeeOther || len(res.Cookies()) != 1 {
		t.Fatalf("%v, %v", res, err)
	}
	c := res.Cookies()[0]
	if !c.HttpOnly || c.SameSite != http.SameSiteStrictMode {
		t.Errorf("the cookie is %v", c)
	}
	if res, _ := get(t, h.URL+"/api/runs", func(r *http.Request) { r.AddCookie(c) }); res.StatusCode != http.StatusOK {
		t.Error(res.Status)
	}
}

// stream reads updates of a run as they come.
type stream struct {
	t    testing.TB
	in   *bufio.Scanner
	body io.Closer
}

func follow(t testing.TB, url string) *stream {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("%s, %s", res.Status, res.Header)
	}
	t.Cleanup(func() { res.Body.Close() })
	in := bufio.NewScanner(res.Body)
	in.Buffer(nil, 64<<20)
	return &stream{t, in, res.Body}
}

func (s *stream) next() (u Update) {
	s.t.Helper()
	for s.in.Scan() {
		text, ok := strings.CutPrefix(s.in.Text(), "data: ")
		if !ok {
			continue
		}
		if err := json.Unmarshal([]byte(text), &u); err != nil {
			s.t.Fatal(err)
		}
		return u
	}
	s.t.Fatalf("the stream has ended: %v", s.in.Err())
	return u
}

func TestFollow(t *testing.T) {
	dir := synthetic(t, "a", 1000, 3)
	_, h := serve(t, Config{Runs: []string{dir}})
	s := follow(t, h.URL+"/api/runs/a/events")
	u := s.next()
	if !u.Full || u.Round != 1000 || len(u.Curves["loss"].Rounds) != 1000 || len(u.Curves["accuracy"].Rounds) != 40 || len(u.Peers) != 3 || len(u.Peers[0].Rounds) != 64 || len(u.Faults) != 1 || u.TotalUSD == 0 || u.Prices == nil {
		t.Fatalf("full %v, round %d, %d peers, %d faults", u.Full, u.Round, len(u.Peers), len(u.Faults))
	}
	if f := u.Faults[0]; f.Message != nasty || f.About != 2 {
		t.Errorf("%+v", f)
	}
	// What comes then is what is new, and torn lines cost nothing.
	add(t, dir, `{"event":"round","pe`+"\n[]\n"+line(t, roundOf(2, 1001, 3)))
	u = s.next()
	if u.Full || u.Round != 1001 || len(u.Curves["loss"].Rounds) > 2*lateRounds || len(u.Faults) != 0 || u.Prices != nil {
		t.Errorf("full %v, round %d, %d points, %d faults", u.Full, u.Round, len(u.Curves["loss"].Rounds), len(u.Faults))
	}
	if n := [3]int{len(u.Peers[0].Rounds), len(u.Peers[1].Rounds), len(u.Peers[2].Rounds)}; n != [3]int{0, 1, 0} {
		t.Errorf("%v rounds of the timeline", n)
	}
	add(t, dir, line(t, events.Event{Event: "peer", Peer: 3, State: "crashed", Message: "signal: killed"})+line(t, events.Event{Event: "waiting", Peer: 1, Step: "gather", Message: "waits"}))
	u = s.next()
	if len(u.Faults) != 1 || u.Peers[2].State != "crashed" || u.Peers[0].Waiting != "waits" || u.Causes["crashed"] != 1 {
		t.Errorf("%+v", u)
	}
	add(t, dir, line(t, events.Event{Event: "done", StopReason: "rounds"}))
	if u = s.next(); u.Done == nil || u.Done.StopReason != "rounds" {
		t.Errorf("%+v", u.Done)
	}
}

// The state of a run is that of run.json, which is written after the event that
// the run is over, or goes on.
func TestFollowState(t *testing.T) {
	dir := synthetic(t, "a", 3, 2)
	state := func(state string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "run.json"), []byte(`{"state":"`+state+`"}`), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	state("running")
	_, h := serve(t, Config{Runs: []string{dir}})
	s := follow(t, h.URL+"/api/runs/a/events")
	if u := s.next(); u.Info == nil || u.Info.State != "running" {
		t.Errorf("%+v", u.Info)
	}
	for _, c := range []struct {
		event events.Event
		state string
	}{
		{events.Event{Event: "done", StopReason: "interrupted"}, "interrupted"},
		{events.Event{Event: "run", State: "resumed"}, "running"},
		{events.Event{Event: "done", StopReason: "rounds"}, "done"},
	} {
		add(t, dir, line(t, c.event))
		if u := s.next(); (u.Done != nil) != (c.event.Event == "done") {
			t.Errorf("%s: %+v", c.state, u.Done)
		}
		state(c.state)
		if u := s.next(); u.Info == nil || u.Info.State != c.state {
			t.Errorf("%s: %+v", c.state, u.Info)
		}
	}
}

// A run that is made anew under the same name is shown anew, one that is gone
// is said to be, and no line, whatever it holds, keeps the rest from being seen.
func TestFollowOddRuns(t *testing.T) {
	dir := synthetic(t, "a", 30, 2)
	path := filepath.Join(dir, "events.jsonl")
	add(t, dir, strings.Repeat(`{"event":"round","peer":1,"round":31,"loss":1.7e308,"seconds":9e9,"time":"0000-01-01T00:00:00Z","steps":[{"step":"compute","ms":1.7e308}]}`+"\n", 3))
	_, h := serve(t, Config{Runs: []string{dir}})
	s := follow(t, h.URL+"/api/runs/a/events")
	if u := s.next(); !u.Full || u.Round != 31 {
		t.Errorf("%+v", u)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if u := s.next(); u.Error == "" || u.Round != 0 || !u.Full {
		t.Errorf("gone: %+v", u)
	}
	if err := os.WriteFile(path, []byte(line(t, roundOf(1, 1, 1))), 0o644); err != nil {
		t.Fatal(err)
	}
	u := s.next()
	for ; u.Round != 1; u = s.next() {
	}
	if len(u.Curves["loss"].Rounds) != 1 || u.Error != "" {
		t.Errorf("anew: %+v", u)
	}
}

// A run that has told nothing yet is waited for, and the number of those who
// follow is bounded.
func TestFollowLimits(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "fresh")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "genesis"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, h := serve(t, Config{Runs: []string{filepath.Dir(dir)}})
	s := follow(t, h.URL+"/api/runs/fresh/events")
	if u := s.next(); u.Error == "" {
		t.Errorf("%+v", u)
	}
	if err := os.WriteFile(filepath.Join(dir, "events.jsonl"), []byte(line(t, roundOf(1, 1, 1))), 0o644); err != nil {
		t.Fatal(err)
	}
	for u := s.next(); u.Round != 1 || u.Error != ""; u = s.next() {
	}
	for range maxStreams - 1 {
		follow(t, h.URL+"/api/runs/fresh/events")
	}
	if res, body := get(t, h.URL+"/api/runs/fresh/events", nil); res.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, "too many") {
		t.Errorf("%s", res.Status)
	}
}

func TestNewRefuses(t *testing.T) {
	empty := t.TempDir()
	for _, runs := range [][]string{nil, {empty}, {filepath.Join(empty, "none")}} {
		if _, err := New(Config{Runs: runs}); err == nil {
			t.Errorf("%v: no error", runs)
		}
	}
	a, b := synthetic(t, "same", 1, 1), synthetic(t, "same", 2, 1)
	s, err := New(Config{Runs: []string{a, b, a}})
	if err != nil || len(s.runs) != 2 || s.runs[0].name == s.runs[1].name {
		t.Errorf("%v, %v", s, err)
	}
}

// The stored files of the page are what its server names.
func TestFiles(t *testing.T) {
	var total int64
	err := fs.WalkDir(static, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		total += info.Size()
		return err
	})
	if err != nil || total > 150_000 {
		t.Errorf("%d bytes, %v", total, err)
	}
}

func BenchmarkSnapshot(b *testing.B) {
	s, err := New(Config{Runs: []string{synthetic(b, "a", 10_000, 4)}})
	if err != nil {
		b.Fatal(err)
	}
	s.runs[0].update(&cursor{}) // reads the events
	var size int
	for b.Loop() {
		text, err := json.Marshal(s.runs[0].update(&cursor{}))
		if err != nil {
			b.Fatal(err)
		}
		size = len(text)
	}
	b.ReportMetric(float64(size)/1000, "kB")
}

// BenchmarkOpen reads the events of 10,000 rounds of four peers.
func BenchmarkOpen(b *testing.B) {
	dir := synthetic(b, "a", 10_000, 4)
	for b.Loop() {
		s, err := New(Config{Runs: []string{dir}})
		if err != nil {
			b.Fatal(err)
		}
		if u := s.runs[0].update(&cursor{}); u.Round != 10_000 {
			b.Fatal(fmt.Sprint("round ", u.Round))
		}
	}
}
