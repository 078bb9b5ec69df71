package function

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
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

// report is its result.
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
		select {}
	case "report":
		http.Post("http://"+os.Getenv("AWS_LAMBDA_RUNTIME_API")+"/2018-06-01/runtime/init/error", "application/json",
			strings.NewReader(`{"errorType":"Test.NoLicence","errorMessage":"the licence has ended"}`))
		select {}
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
		case "print":
			fmt.Println(o.Value)
		case "signal": // writes its pid into a file and waits to be killed
			os.WriteFile(o.Value+".new", fmt.Append(nil, os.Getpid()), 0o600)
			os.Rename(o.Value+".new", o.Value)
			select {}
		case "hang":
			select {}
		case "child": // leaves a process of its own behind
			cmd := exec.Command(Self())
			cmd.Env = append(os.Environ(), "SPIRT_TEST_INIT=hang")
			if err := cmd.Start(); err != nil {
				return a, err
			}
			a.Child = cmd.Process.Pid
		case "crash":
			fmt.Fprintln(os.Stderr, "about to crash:", o.Value)
			os.Exit(3)
		case "crash once": // only the first of all instances crashes
			if f, err := os.OpenFile(o.Value, os.O_CREATE|os.O_EXCL, 0o600); err == nil {
				f.Close()
				os.Exit(3)
			}
		case "answer late": // exits between its answer and its next poll
			go func() { time.Sleep(time.Millisecond); os.Exit(5) }()
		case "allocate":
			hoard = make([]byte, o.Size<<20)
			for i := range hoard {
				hoard[i] = 1
			}
			select {}
		case "big":
			a.Value = strings.Repeat("x", o.Size)
		case "fail":
			return a, messages.InvokeResponse_Error{Type: o.Value, Message: "it went wrong"}
		case "panic":
			panic(o.Value)
		}
		return a, nil
	})
}

var hoard []byte

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
	c.Name, c.Command = "test-function", []string{Self()}
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
