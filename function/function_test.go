package function

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestWarmInvocations(t *testing.T) {
	p := platform(t, Config{Concurrency: 2})
	body, first, err := p.Invoke(t.Context(), event(t, order{Do: "echo", Value: "a"}))
	if err != nil {
		t.Fatal(err)
	}
	a := read(t, body)
	if a.Value != "a" || a.Count != 1 || a.RequestID != first.RequestID || a.ARN != "arn:aws:lambda:us-east-1:000000000000:function:test-function" {
		t.Errorf("result %+v", a)
	}
	if left := time.UnixMilli(a.Deadline).Sub(first.Start); left < 59*time.Second || left > 2*time.Minute {
		t.Errorf("the deadline is %v after the start, want 1 minute", left)
	}
	if !first.Cold || first.Init <= 0 || first.Duration <= 0 || first.Instance != a.PID || first.Attempt != 1 || first.MemoryMB != 1024 {
		t.Errorf("meter %+v", first)
	}
	if want := (first.Init + first.Duration + time.Millisecond - 1).Truncate(time.Millisecond); first.Billed != want {
		t.Errorf("billed %v, want %v", first.Billed, want)
	}
	if canReadMemory && first.PeakMemoryMB == 0 {
		t.Error("no peak memory")
	}
	for i := range 3 {
		body, inv, err := p.Invoke(t.Context(), event(t, order{Do: "echo", Value: "b"}))
		if err != nil {
			t.Fatal(err)
		}
		if b := read(t, body); b.PID != a.PID || b.Count != i+2 || inv.Cold || inv.Init != 0 || inv.RequestID == first.RequestID {
			t.Errorf("warm: %+v, %+v", b, inv)
		}
	}
	s := p.Stats()
	if s.Invocations != 4 || s.Cold != 1 || s.Errors != 0 || s.Instances != 1 || s.GBSeconds < s.Billed.Seconds()*0.99 {
		t.Errorf("stats %+v", s)
	}
	if list := p.Instances(); len(list) != 1 || list[0].PID != a.PID || list[0].Invocations != 4 {
		t.Errorf("instances %+v", list)
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("SPIRT_TEST_SECRET", "the peer's")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "the peer's")
	p := platform(t, Config{MemoryMB: 200, Env: []string{"SPIRT_DB_TOKEN=t", "AWS_REGION=eu-north-1", "AWS_LAMBDA_RUNTIME_API=192.0.2.1:1"}})
	body, _, err := p.Invoke(t.Context(), event(t, order{Do: "env"}))
	if err != nil {
		t.Fatal(err)
	}
	env := read(t, body).Env
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"AWS_LAMBDA_FUNCTION_NAME": "test-function", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "200", "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
		"AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand", "AWS_LAMBDA_LOG_GROUP_NAME": "/aws/lambda/test-function", "_HANDLER": "bootstrap",
		"AWS_REGION": "eu-north-1", "AWS_DEFAULT_REGION": "eu-north-1", "LAMBDA_TASK_ROOT": wd, "GOMAXPROCS": "1", "GOMEMLIMIT": "180MiB",
		"SPIRT_DB_TOKEN": "t", "PATH": os.Getenv("PATH"),
	} {
		if env[key] != want {
			t.Errorf("%s is %q, want %q", key, env[key], want)
		}
	}
	for _, key := range []string{"SPIRT_TEST_SECRET", "AWS_SECRET_ACCESS_KEY"} {
		if v, ok := env[key]; ok {
			t.Errorf("%s=%s reached the instance", key, v)
		}
	}
	if !strings.HasPrefix(env["AWS_LAMBDA_RUNTIME_API"], "127.0.0.1:") {
		t.Errorf("Runtime API at %q", env["AWS_LAMBDA_RUNTIME_API"])
	}
}

// The instance used last is used next.
func TestLastUsedFirst(t *testing.T) {
	p := platform(t, Config{Concurrency: 3})
	events, g := watch(p), newGate(t)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if _, _, err := p.Invoke(t.Context(), event(t, order{Do: "gate", Value: g.url})); err != nil {
				t.Error(err)
			}
		})
	}
	g.wait(t, 3)
	g.let(3)
	wg.Wait()
	pids := await(t, events, "idle", 3)
	_, inv, err := p.Invoke(t.Context(), event(t, order{Do: "echo"}))
	if err != nil || inv.Instance != pids[2] {
		t.Fatalf("instances came back as %v, the next invocation went to %d: %v", pids, inv.Instance, err)
	}
}

// Not more than Concurrency run at once, and who came first is served first.
func TestConcurrencyLimit(t *testing.T) {
	p := platform(t, Config{Concurrency: 2})
	events, g := watch(p), newGate(t)
	var wg sync.WaitGroup
	invoke := func(i int) {
		wg.Go(func() {
			_, inv, err := p.Invoke(t.Context(), event(t, order{Do: "gate", Value: fmt.Sprintf("%s?%d", g.url, i)}))
			if err != nil {
				t.Error(err)
			}
			if i >= 2 && inv.Queue <= 0 {
				t.Errorf("caller %d waited, but was metered %v", i, inv.Queue)
			}
		})
	}
	invoke(0)
	invoke(1)
	g.wait(t, 2)
	for i := 2; i < 6; i++ {
		invoke(i)
		await(t, events, "wait", 1)
	}
	if s := p.Stats(); s.Waiting != 4 || s.Instances != 2 {
		t.Errorf("stats %+v", s)
	}
	for i := 2; i < 6; i++ {
		g.let(1)
		if next := g.wait(t, 1); next[0] != strconv.Itoa(i) {
			t.Errorf("caller %s is served, want %d", next[0], i)
		}
	}
	g.let(2)
	wg.Wait()
	if most := g.most.Load(); most > 3 { // two, and one that the gate has let through and not yet left
		t.Errorf("%d ran at once, want 2", most)
	}
	if s := p.Stats(); s.Cold != 2 || s.Instances != 2 {
		t.Errorf("stats %+v", s)
	}
}

func TestCallersLeave(t *testing.T) {
	ended := make(chan Invocation, 10)
	p := platform(t, Config{Concurrency: 1, OnInvocation: func(i Invocation) { ended <- i }})
	events, g := watch(p), newGate(t)
	running, leave := context.WithCancel(t.Context())
	left := make(chan error, 2)
	go func() {
		_, _, err := p.Invoke(running, event(t, order{Do: "gate", Value: g.url}))
		left <- err
	}()
	g.wait(t, 1)
	waiting, leaveQueue := context.WithCancelCause(t.Context())
	go func() {
		_, _, err := p.Invoke(waiting, event(t, order{Do: "echo"}))
		left <- err
	}()
	await(t, events, "wait", 1)

	leaveQueue(errors.New("the round is over"))
	if err := <-left; err == nil || !strings.Contains(err.Error(), "the round is over") {
		t.Errorf("a caller that left the queue got %v", err)
	}
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that left got %v", err)
	}
	if len(ended) != 0 {
		t.Error("the invocation was metered before its end")
	}
	g.let(1)
	if i := <-ended; i.Error != "" || i.Duration <= 0 {
		t.Errorf("meter %+v", i)
	}
	if _, inv, err := p.Invoke(t.Context(), event(t, order{Do: "echo"})); err != nil || inv.Cold {
		t.Errorf("afterwards: %+v, %v", inv, err)
	}
}

func TestTimeout(t *testing.T) {
	var mu sync.Mutex
	var metered []Invocation
	p := platform(t, Config{Concurrency: 1, Timeout: 150 * time.Millisecond, Retries: 1, OnInvocation: func(i Invocation) {
		mu.Lock()
		metered = append(metered, i)
		mu.Unlock()
	}})
	_, inv, err := p.Invoke(t.Context(), event(t, order{Do: "hang"}))
	var failed *FunctionError
	if !errors.As(err, &failed) || failed.Type != TypeTimeout || !strings.HasSuffix(failed.Message, "Error: Task timed out after 0.15 seconds") {
		t.Fatalf("error %v", err)
	}
	if inv.Attempt != 2 || inv.Duration < 150*time.Millisecond || inv.Error != TypeTimeout {
		t.Errorf("meter %+v", inv)
	}
	if !strings.Contains(err.Error(), "attempt 2 of 2") {
		t.Errorf("error %v does not say that it was retried", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(metered) != 2 || metered[0].RequestID != metered[1].RequestID || metered[0].Instance == metered[1].Instance {
		t.Errorf("metered %+v", metered)
	}
	if s := p.Stats(); s.Timeouts != 2 || s.Retries != 1 || s.Errors != 2 {
		t.Errorf("stats %+v", s)
	}
}

// An instance that has answered may not go on for longer than its invocation could.
func TestBusyAfterAnswer(t *testing.T) {
	p := platform(t, Config{Concurrency: 1, Timeout: 100 * time.Millisecond, Env: []string{"SPIRT_TEST_INIT=stay"}})
	events := watch(p)
	body, _, err := p.Invoke(t.Context(), event(t, order{}))
	if err != nil {
		t.Fatal(err)
	}
	if pids := await(t, events, "exit", 1); pids[0] != read(t, body).PID {
		t.Errorf("process %v ended, not %d", pids, read(t, body).PID)
	}
	if s := p.Stats(); s.Errors != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestCrash(t *testing.T) {
	p := platform(t, Config{Retries: 2, Isolation: Isolation{Off: true}}) // one of them makes a file
	_, inv, err := p.Invoke(t.Context(), event(t, order{Do: "crash", Value: "no luck"}))
	var failed *FunctionError
	if !errors.As(err, &failed) || failed.Type != TypeExit {
		t.Fatalf("error %v", err)
	}
	for _, want := range []string{"exit status 3", "about to crash: no luck", "attempt 3 of 3", inv.RequestID} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
	if s := p.Stats(); s.Crashes != 3 || s.Invocations != 3 || s.Cold != 3 || s.Retries != 2 {
		t.Errorf("stats %+v", s)
	}
	_, inv, err = p.Invoke(t.Context(), event(t, order{Do: "crash once", Value: filepath.Join(t.TempDir(), "crashed")}))
	if err != nil || inv.Attempt != 2 {
		t.Errorf("after one crash: %+v, %v", inv, err)
	}
}

// An instance that ends between its answer and its next poll fails nobody.
func TestEndAfterAnswer(t *testing.T) {
	p := platform(t, Config{Concurrency: 1, Retries: -1, Env: []string{"SPIRT_TEST_INIT=leave"}})
	for range 5 {
		if _, inv, err := p.Invoke(t.Context(), event(t, order{})); err != nil || !inv.Cold {
			t.Fatalf("%+v, %v", inv, err)
		}
	}
}

// A call that may not wait for its turn waits all the same for the end of an instance that has answered: it is not taken.
func TestNotRefusedAfterAnswer(t *testing.T) {
	p := platform(t, Config{Concurrency: 1, Timeout: 10 * patience, Env: []string{"SPIRT_TEST_INIT=stay"}})
	for range 3 {
		if out := p.invoke(t.Context(), newRequestID(), event(t, order{}), 0, false); out.err != nil || !out.inv.Cold {
			t.Fatalf("%+v, %v", out.inv, out.err)
		}
	}
}

func TestInitFailure(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("not a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		config Config
		want   []string
	}{
		"exit":    {Config{Env: []string{"SPIRT_TEST_INIT=exit"}}, []string{"exit status 7", "no model in this folder", "before it polled"}},
		"timeout": {Config{Env: []string{"SPIRT_TEST_INIT=hang"}, InitTimeout: 100 * time.Millisecond}, []string{"did not poll for work within 0.10 seconds"}},
		"report":  {Config{Env: []string{"SPIRT_TEST_INIT=report"}}, []string{"Test.NoLicence: the licence has ended"}},
		"exec":    {Config{Command: []string{text}}, []string{"starting the process", text}},
	} {
		t.Run(name, func(t *testing.T) {
			c.config.Retries = 1
			p := platform(t, c.config)
			_, inv, err := p.Invoke(t.Context(), event(t, order{Do: "echo"}))
			var failed *FunctionError
			if !errors.As(err, &failed) || failed.Type != TypeInit {
				t.Fatalf("error %v", err)
			}
			for _, want := range append(c.want, "attempt 2 of 2") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %v does not say %q", err, want)
				}
			}
			if !inv.Cold || inv.Init <= 0 || inv.Duration != 0 || inv.Billed < inv.Init {
				t.Errorf("meter %+v", inv)
			}
		})
	}
	t.Run("flaky", func(t *testing.T) {
		p := platform(t, Config{Isolation: Isolation{Off: true}, Env: []string{"SPIRT_TEST_INIT=flaky", "SPIRT_TEST_FILE=" + filepath.Join(t.TempDir(), "started")}})
		if _, inv, err := p.Invoke(t.Context(), event(t, order{Do: "echo"})); err != nil || inv.Attempt != 2 {
			t.Errorf("%+v, %v", inv, err)
		}
	})
}

func TestHandlerErrors(t *testing.T) {
	p := platform(t, Config{Concurrency: 1, Retries: 2})
	for _, c := range []struct {
		order    order
		attempts int
		kind     string
		message  string
	}{
		{order{Do: "fail", Value: "DatabaseUnavailable"}, 3, "DatabaseUnavailable", "it went wrong"},
		{order{Do: "fail", Value: "PermanentBadEvent"}, 1, "PermanentBadEvent", "it went wrong"},
		{order{Do: "panic", Value: "out of range"}, 3, "string", "out of range"},
		{order{Do: "big", Size: MaxResponse}, 1, TypeTooLarge, "exceeded maximum allowed payload size"},
	} {
		_, inv, err := p.Invoke(t.Context(), event(t, c.order))
		var failed *FunctionError
		if !errors.As(err, &failed) || failed.Type != c.kind || !strings.Contains(failed.Message, c.message) || inv.Attempt != c.attempts {
			t.Errorf("%+v: attempt %d, error %v", c.order, inv.Attempt, err)
			continue
		}
		if failed.Permanent() != (c.attempts == 1) {
			t.Errorf("%v: permanent is %v", err, failed.Permanent())
		}
		if c.order.Do == "panic" && !strings.Contains(string(failed.StackTrace), "main_test.go") {
			t.Errorf("stack trace %s", failed.StackTrace)
		}
	}
	if body, _, err := p.Invoke(t.Context(), event(t, order{Do: "big", Size: 5 << 20})); err != nil || len(read(t, body).Value) != 5<<20 {
		t.Errorf("a result of 5 MiB: %d bytes, %v", len(body), err)
	}
	if _, _, err := p.Invoke(t.Context(), make([]byte, MaxPayload+1)); err == nil || !strings.Contains(err.Error(), "over the limit") {
		t.Errorf("an event over the limit: %v", err)
	}
}

func TestRuntimeAPIMistakes(t *testing.T) {
	p := platform(t, Config{Concurrency: 1, Env: []string{"SPIRT_TEST_INIT=raw"}})
	for range 2 {
		body, _, err := p.Invoke(t.Context(), event(t, order{}))
		if err != nil {
			t.Fatal(err)
		}
		if got := read(t, body).Value; got != "403 400 404 403 405" {
			t.Errorf("statuses %s", got)
		}
	}
}

// An instance whose Runtime API has gone ends by itself: so it does where the kernel does not kill it with its peer.
func TestRuntimeAPIGone(t *testing.T) {
	polls := make(chan struct{}, 10)
	stop := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		polls <- struct{}{}
		<-stop
	}))
	cmd := exec.Command(Self())
	cmd.Env = append(os.Environ(), "AWS_LAMBDA_RUNTIME_API="+strings.TrimPrefix(s.URL, "http://"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-polls:
	case err := <-done:
		t.Fatal(err)
	}
	s.CloseClientConnections()
	close(stop)
	s.Close()
	select {
	case err := <-done:
		if err == nil {
			t.Error("it ended with success")
		}
	case <-time.After(20 * time.Second):
		cmd.Process.Kill()
		t.Fatal("the instance lives on")
	}
}

func TestIdleReaping(t *testing.T) {
	p := platform(t, Config{Concurrency: 2, IdleTimeout: 30 * time.Millisecond})
	events := watch(p)
	body, _, err := p.Invoke(t.Context(), event(t, order{Do: "echo"}))
	if err != nil {
		t.Fatal(err)
	}
	pid := read(t, body).PID
	if got := await(t, events, "reap", 1); got[0] != pid {
		t.Errorf("reaped %v, want %d", got, pid)
	}
	await(t, events, "exit", 1)
	if s := p.Stats(); s.Instances != 0 || s.Idle != 0 || s.Errors != 0 {
		t.Errorf("stats %+v", s)
	}
	if _, inv, err := p.Invoke(t.Context(), event(t, order{Do: "echo"})); err != nil || !inv.Cold {
		t.Errorf("afterwards: %+v, %v", inv, err)
	}
}

func TestClose(t *testing.T) {
	p := platform(t, Config{Concurrency: 2, Retries: 5})
	events, g := watch(p), newGate(t)
	errs := make(chan error, 3)
	for range 2 {
		go func() {
			_, _, err := p.Invoke(t.Context(), event(t, order{Do: "gate", Value: g.url}))
			errs <- err
		}()
	}
	g.wait(t, 2)
	go func() {
		_, _, err := p.Invoke(t.Context(), event(t, order{Do: "echo"}))
		errs <- err
	}()
	await(t, events, "wait", 1)
	var pids []int
	for _, in := range p.Instances() {
		pids = append(pids, in.PID)
	}
	var wg sync.WaitGroup
	for range 2 { // the second waits for the first
		wg.Go(func() {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			for _, pid := range pids {
				if alive(pid) {
					t.Errorf("process %d is left", pid)
				}
			}
		})
	}
	wg.Wait()
	for range 3 {
		if err := <-errs; !errors.Is(err, ErrClosed) {
			t.Errorf("error %v, want %v", err, ErrClosed)
		}
	}
	if _, _, err := p.Invoke(t.Context(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if s := p.Stats(); s.Instances != 0 || s.Waiting != 0 {
		t.Errorf("stats %+v", s)
	}
}

// Close while instances start, are idle and come back; nothing may be left or hang.
func TestCloseAtAnyTime(t *testing.T) {
	for i := range 8 {
		p := platform(t, Config{Concurrency: 3})
		events := watch(p)
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				for {
					if _, _, err := p.Invoke(t.Context(), event(t, order{Do: "echo"})); err != nil {
						if !errors.Is(err, ErrClosed) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		if i%2 == 0 {
			await(t, events, "start", 1+i/2%3)
		} else {
			await(t, events, "wait", 1+i)
		}
		p.Close()
		wg.Wait()
		if s := p.Stats(); s.Instances != 0 {
			t.Errorf("stats %+v", s)
		}
	}
}

func TestConfig(t *testing.T) {
	for want, c := range map[string]Config{
		"no command":          {},
		"not found":           {Command: []string{"no-such-program-anywhere"}},
		"letters, digits":     {Name: "a b", Command: []string{Self()}},
		"working folder":      {Dir: filepath.Join(t.TempDir(), "none"), Command: []string{Self()}},
		"is not KEY=VALUE":    {Env: []string{"=x"}, Command: []string{Self()}},
		"concurrency of -1":   {Concurrency: -1, Command: []string{Self()}},
		"memory in MB of -1":  {MemoryMB: -1, Command: []string{Self()}},
		"timeout in ms of -1": {Timeout: -time.Millisecond, Command: []string{Self()}},
		"retries of 101":      {Retries: 101, Command: []string{Self()}},
	} {
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v, want %q", c, err, want)
		}
	}
}

func TestBackoff(t *testing.T) {
	p := &Platform{cfg: Config{RetryBase: 50 * time.Millisecond, RetryMax: 2 * time.Second}}
	for attempt, limit := range map[int]time.Duration{1: 50, 2: 100, 3: 200, 6: 1600, 7: 2000, 40: 2000, 1000: 2000} {
		limit *= time.Millisecond
		var most time.Duration
		for range 1000 {
			d := p.backoff(attempt)
			if d < 0 || d >= limit {
				t.Fatalf("attempt %d: %v, want 0 to %v", attempt, d, limit)
			}
			most = max(most, d)
		}
		if most < limit*9/10 { // chance of 0.9^1000
			t.Errorf("attempt %d: at most %v of %v in 1000 draws", attempt, most, limit)
		}
	}
}

func FuzzDecodeFunctionError(f *testing.F) {
	f.Add("", []byte(`{"errorType":"A","errorMessage":"b","stackTrace":[{"path":"x"}]}`))
	f.Add("Header", []byte("\xff not json"))
	f.Add("", []byte(`{"stackTrace":`))
	f.Fuzz(func(t *testing.T, header string, body []byte) {
		e := decodeFunctionError(header, body)
		if e.Type == "" || len(e.Type) > 300 || len(e.Message) > 33<<10 {
			t.Errorf("%+v", e)
		}
		if _, err := json.Marshal(e); err != nil {
			t.Errorf("%+v cannot be passed on: %v", e, err)
		}
	})
}
