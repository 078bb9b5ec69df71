package function

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-lambda-go/lambda"
	"github.com/aws/aws-lambda-go/lambda/messages"
	"github.com/aws/aws-lambda-go/lambdacontext"
)

// The test binary is its own function: started with a Runtime API in its environment it is an instance, with
// SPIRT_TEST_PEER set it is a peer to be killed.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("AWS_LAMBDA_RUNTIME_API") != "":
		instanceMain()
	case os.Getenv("SPIRT_TEST_PEER") != "":
		peerMain()
	default:
		os.Exit(m.Run())
	}
}

// order is the event of the test function: what to do.
type order struct {
	Do    string `json:"do"`
	Value string `json:"value,omitempty"`
	Size  int    `json:"size,omitempty"`
}

// answer is its result.
type answer struct {
	Value     string            `json:"value"`
	PID       int               `json:"pid"`
	Child     int               `json:"child,omitempty"`
	Count     int               `json:"count"` // invocations of this instance
	RequestID string            `json:"request_id"`
	ARN       string            `json:"arn"`
	Deadline  int64             `json:"deadline"` // ms
	Env       map[string]string `json:"env,omitempty"`
}

func instanceMain() {
	switch os.Getenv("SPIRT_TEST_INIT") {
	case "exit":
		fmt.Println("no model in this folder")
		os.Exit(7)
	case "hang":
		hang()
	case "raw":
		rawMain()
	case "leave", "stay":
		afterAnswerMain()
	case "report":
		http.Post("http://"+os.Getenv("AWS_LAMBDA_RUNTIME_API")+"/2018-06-01/runtime/init/error", "application/json",
			strings.NewReader(`{"errorType":"Test.NoLicence","errorMessage":"the licence has ended"}`))
		hang()
	case "flaky": // fails unless the file is there, and makes it
		f, err := os.OpenFile(os.Getenv("SPIRT_TEST_FILE"), os.O_CREATE|os.O_EXCL, 0o600)
		if err == nil {
			f.Close()
			os.Exit(1)
		}
	}
	count := 0
	lambda.Start(func(ctx context.Context, o order) (answer, error) {
		count++
		lc, _ := lambdacontext.FromContext(ctx)
		deadline, _ := ctx.Deadline()
		a := answer{Value: o.Value, PID: os.Getpid(), Count: count, RequestID: lc.AwsRequestID, ARN: lc.InvokedFunctionArn, Deadline: deadline.UnixMilli()}
		switch o.Do {
		case "echo":
		case "env":
			a.Env = map[string]string{}
			for _, kv := range os.Environ() {
				k, v, _ := strings.Cut(kv, "=")
				a.Env[k] = v
			}
		case "gate": // tells the test that it runs, and waits for it
			r, err := http.Get(o.Value)
			if err != nil {
				return a, err
			}
			r.Body.Close()
		case "print":
			fmt.Println(o.Value)
		case "hang":
			hang()
		case "child": // leaves a process of its own behind
			cmd := exec.Command(Self())
			cmd.Env = append(os.Environ(), "SPIRT_TEST_INIT=hang")
			if err := cmd.Start(); err != nil {
				return a, err
			}
			a.Child = cmd.Process.Pid
		case "child and hang":
			cmd := exec.Command(Self())
			cmd.Env = append(os.Environ(), "SPIRT_TEST_INIT=hang")
			if err := cmd.Start(); err != nil {
				return a, err
			}
			fmt.Println("child", cmd.Process.Pid)
			hang()
		case "crash":
			fmt.Fprintln(os.Stderr, "about to crash:", o.Value)
			os.Exit(3)
		case "crash once": // only the first of all instances crashes
			if f, err := os.OpenFile(o.Value, os.O_CREATE|os.O_EXCL, 0o600); err == nil {
				f.Close()
				os.Exit(3)
			}
		case "allocate":
			hoard = make([]byte, o.Size<<20)
			for i := range hoard {
				hoard[i] = 1
			}
			hang()
		case "big":
			a.Value = strings.Repeat("x", o.Size)
		case "try":
			a.Value = try(strings.Split(o.Value, "\n"))
		case "fail":
			return a, messages.InvokeResponse_Error{Type: o.Value, Message: "it went wrong"}
		case "panic":
			panic(o.Value)
		}
		return a, nil
	})
}

// try does what it is told and returns what succeeded.
func try(deeds []string) string {
	var done []string
	for _, deed := range deeds {
		verb, what, _ := strings.Cut(deed, " ")
		var err error
		switch verb {
		case "read":
			var f *os.File
			if f, err = os.Open(what); err == nil {
				_, err = f.Stat()
				f.Close()
			}
		case "write":
			err = os.WriteFile(what, []byte("x"), 0o600)
		case "dial":
			network, address, _ := strings.Cut(what, ":")
			var c net.Conn
			if c, err = net.DialTimeout(network, address, 5*time.Second); err == nil {
				c.Close()
			}
		case "signal":
			pid, _ := strconv.Atoi(what)
			var p *os.Process
			if p, err = os.FindProcess(pid); err == nil {
				err = p.Signal(syscall.Signal(0)) // asks whether it may
			}
		default:
			err = fmt.Errorf("no such deed")
		}
		if err == nil {
			done = append(done, deed)
		}
	}
	return strings.Join(done, "\n")
}

var hoard []byte

// hang waits for ever; a bare select would be found to be a deadlock.
func hang() {
	for {
		time.Sleep(time.Hour)
	}
}

func event(t testing.TB, o order) []byte {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func read(t testing.TB, b []byte) (a answer) {
	t.Helper()
	if err := json.Unmarshal(b, &a); err != nil {
		t.Fatalf("result %q: %v", b, err)
	}
	return a
}

// platform makes a platform of test instances that is closed at the end of the test.
func platform(t testing.TB, c Config) *Platform {
	t.Helper()
	c.Name = "test-function"
	if c.Command == nil {
		c.Command = []string{Self()}
	}
	c.Isolation.Network = true // the tests have gates
	if c.RetryBase == 0 {
		c.RetryBase = time.Millisecond
	}
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// watch returns the events of p, which must not have been used yet.
func watch(p *Platform) <-chan happening {
	events := make(chan happening, 10_000)
	p.onEvent = func(what string, pid int) { events <- happening{what, pid} }
	return events
}

type happening struct {
	what string
	pid  int
}

// await waits for n events of a kind and returns their process ids.
func await(t testing.TB, events <-chan happening, what string, n int) (pids []int) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	for len(pids) < n {
		select {
		case e := <-events:
			if e.what == what {
				pids = append(pids, e.pid)
			}
		case <-deadline.C:
			t.Fatalf("waited in vain for %d times %q, have %v", n, what, pids)
		}
	}
	return pids
}

// gate is where invocations of "gate" wait until they are let through.
type gate struct {
	url     string
	arrived chan string   // the query of each arrival's address
	open    chan struct{} // let through one for each value
	inside  atomic.Int32
	most    atomic.Int32
}

func newGate(t testing.TB) *gate {
	g := &gate{arrived: make(chan string, 1000), open: make(chan struct{}, 1000)}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := g.inside.Add(1)
		defer g.inside.Add(-1)
		for old := g.most.Load(); n > old && !g.most.CompareAndSwap(old, n); old = g.most.Load() {
		}
		g.arrived <- r.URL.RawQuery
		select {
		case <-g.open:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(s.Close)
	g.url = s.URL
	return g
}

// wait waits for n arrivals and returns their queries.
func (g *gate) wait(t testing.TB, n int) (queries []string) {
	t.Helper()
	for range n {
		select {
		case query := <-g.arrived:
			queries = append(queries, query)
		case <-time.After(20 * time.Second):
			t.Fatal("waited in vain for an invocation to begin")
		}
	}
	return queries
}

func (g *gate) let(n int) {
	for range n {
		g.open <- struct{}{}
	}
}

// rawMain speaks the Runtime API by hand, with mistakes, and answers with the statuses it got.
func rawMain() {
	base := "http://" + os.Getenv("AWS_LAMBDA_RUNTIME_API") + "/2018-06-01/runtime/"
	var statuses []string
	do := func(method, path, body string) *http.Response {
		req, _ := http.NewRequest(method, base+path, strings.NewReader(body))
		r, err := http.DefaultClient.Do(req)
		if err != nil {
			os.Exit(1)
		}
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
		statuses = append(statuses, strconv.Itoa(r.StatusCode))
		return r
	}
	for {
		r := do("GET", "invocation/next", "")
		id := r.Header.Get("Lambda-Runtime-Aws-Request-Id")
		statuses = nil
		do("GET", "invocation/next", "")                 // not answered yet
		do("POST", "invocation/nonsense/response", "{}") // another's
		do("POST", "invocation/"+id+"/nonsense", "{}")   // no such path
		do("POST", "init/error", "{}")                   // has started
		do("PUT", "invocation/"+id+"/response", "{}")    // no such method
		body, _ := json.Marshal(answer{Value: strings.Join(statuses, " "), PID: os.Getpid()})
		do("POST", "invocation/"+id+"/response", string(body))
		do("POST", "invocation/"+id+"/response", string(body)) // again: dropped
	}
}

// afterAnswerMain answers one invocation and then exits or stays away from the Runtime API.
func afterAnswerMain() {
	base := "http://" + os.Getenv("AWS_LAMBDA_RUNTIME_API") + "/2018-06-01/runtime/invocation/"
	r, err := http.Get(base + "next")
	if err != nil {
		os.Exit(1)
	}
	body, _ := json.Marshal(answer{PID: os.Getpid()})
	http.Post(base+r.Header.Get("Lambda-Runtime-Aws-Request-Id")+"/response", "application/json", bytes.NewReader(body))
	if os.Getenv("SPIRT_TEST_INIT") == "leave" {
		os.Exit(5)
	}
	hang()
}
