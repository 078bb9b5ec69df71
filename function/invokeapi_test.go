package function

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awslambda "github.com/aws/aws-sdk-go-v2/service/lambda"
	"github.com/aws/aws-sdk-go-v2/service/lambda/types"
)

// sdk is AWS's own client with the platform as its endpoint.
func sdk(endpoint string) *awslambda.Client {
	return awslambda.New(awslambda.Options{
		Region:       "us-east-1",
		BaseEndpoint: aws.String(endpoint),
		Credentials:  credentials.NewStaticCredentialsProvider("id", "secret", ""),
		Retryer:      aws.NopRetryer{},
	})
}

func served(t *testing.T, p *Platform) string {
	s := httptest.NewServer(p.InvokeHandler())
	t.Cleanup(s.Close)
	return s.URL
}

func TestSDK(t *testing.T) {
	ended := make(chan Invocation, 10)
	p := platform(t, Config{Concurrency: 1, Retries: 1, OnInvocation: func(i Invocation) { ended <- i }})
	client := sdk(served(t, p))
	ctx := t.Context()
	name := aws.String("test-function")

	t.Run("RequestResponse", func(t *testing.T) {
		for _, name := range []string{
			"test-function", "test-function:$LATEST", "000000000000:function:test-function",
			"arn:aws:lambda:us-east-1:000000000000:function:test-function", "arn:aws:lambda:us-east-1:000000000000:function:test-function:$LATEST",
		} {
			out, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: &name, Payload: event(t, order{Do: "echo", Value: "hello"})})
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			<-ended
			if out.StatusCode != 200 || out.FunctionError != nil || aws.ToString(out.ExecutedVersion) != "$LATEST" || read(t, out.Payload).Value != "hello" || out.LogResult != nil {
				t.Errorf("%s: %+v", name, out)
			}
		}
	})
	t.Run("no payload", func(t *testing.T) {
		out, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name})
		if err != nil || out.FunctionError != nil {
			t.Errorf("%+v, %v", out, err)
		}
		<-ended
	})
	t.Run("log tail", func(t *testing.T) {
		out, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, LogType: types.LogTypeTail, Payload: event(t, order{Do: "print", Value: "from the function"})})
		if err != nil {
			t.Fatal(err)
		}
		<-ended
		log, err := base64.StdEncoding.DecodeString(aws.ToString(out.LogResult))
		for _, want := range []string{"START RequestId: " + read(t, out.Payload).RequestID, "\nfrom the function\nEND RequestId", "Billed Duration: ", "Memory Size: 1024 MB"} {
			if err != nil || !strings.Contains(string(log), want) {
				t.Errorf("log %q has no %q: %v", log, want, err)
			}
		}
	})
	t.Run("function error", func(t *testing.T) {
		for _, c := range []struct{ do, kind string }{{"fail", "Test.Error"}, {"panic", "string"}, {"crash", TypeExit}} {
			out, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, Payload: event(t, order{Do: c.do, Value: "Test.Error"})})
			if err != nil {
				t.Fatalf("%s: %v", c.do, err)
			}
			if i := <-ended; i.Error != c.kind || len(ended) != 0 {
				t.Errorf("%s: meter %+v; a call that is waited for is not retried", c.do, i)
			}
			var body struct{ ErrorType, ErrorMessage string }
			if err := json.Unmarshal(out.Payload, &body); err != nil || out.StatusCode != 200 || aws.ToString(out.FunctionError) != "Unhandled" || body.ErrorType != c.kind || body.ErrorMessage == "" {
				t.Errorf("%s: status %d, %s, %s", c.do, out.StatusCode, aws.ToString(out.FunctionError), out.Payload)
			}
		}
	})
	t.Run("Event", func(t *testing.T) {
		out, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, InvocationType: types.InvocationTypeEvent, Payload: event(t, order{Do: "fail", Value: "Test.Error"})})
		if err != nil || out.StatusCode != 202 || len(out.Payload) != 0 {
			t.Fatalf("%+v, %v", out, err)
		}
		if a, b := <-ended, <-ended; a.Attempt != 1 || b.Attempt != 2 || a.RequestID != b.RequestID {
			t.Errorf("attempts %+v, %+v", a, b)
		}
	})
	t.Run("DryRun", func(t *testing.T) {
		out, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, InvocationType: types.InvocationTypeDryRun, Payload: []byte(`{}`)})
		if err != nil || out.StatusCode != 204 || len(ended) != 0 {
			t.Errorf("%+v, %v", out, err)
		}
	})
	t.Run("unknown", func(t *testing.T) {
		for _, name := range []string{"other", "test-function:7", "arn:aws:lambda:us-east-1:000000000000:function:other"} {
			_, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: &name})
			var missing *types.ResourceNotFoundException
			if !errors.As(err, &missing) || !strings.Contains(missing.ErrorMessage(), "Function not found") || aws.ToString(missing.Type) != "User" {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("too large", func(t *testing.T) {
		for kind, size := range map[types.InvocationType]int{types.InvocationTypeRequestResponse: MaxPayload, types.InvocationTypeEvent: MaxAsyncPayload} {
			payload := append(append([]byte(`"`), bytes.Repeat([]byte("x"), size)...), '"')
			_, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, InvocationType: kind, Payload: payload})
			var large *types.RequestTooLargeException
			if !errors.As(err, &large) {
				t.Errorf("%s: %v", kind, err)
			}
		}
	})
	t.Run("bad JSON", func(t *testing.T) {
		_, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, Payload: []byte(`{"do":`)})
		var bad *types.InvalidRequestContentException
		if !errors.As(err, &bad) {
			t.Error(err)
		}
		_, err = client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, InvocationType: "Sometimes"})
		var invalid *types.InvalidParameterValueException
		if !errors.As(err, &invalid) {
			t.Error(err)
		}
	})
	t.Run("other operation", func(t *testing.T) {
		if _, err := client.ListFunctions(ctx, nil); err == nil || !strings.Contains(err.Error(), "only Invoke is served here") {
			t.Error(err)
		}
	})
	t.Run("throttled", func(t *testing.T) {
		g := newGate(t)
		done := make(chan error, 1)
		go func() {
			_, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, Payload: event(t, order{Do: "gate", Value: g.url})})
			done <- err
		}()
		g.wait(t, 1)
		_, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name, Payload: event(t, order{Do: "echo"})})
		var busy *types.TooManyRequestsException
		if !errors.As(err, &busy) || p.Stats().Throttled != 1 {
			t.Error(err)
		}
		g.let(1)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	p.Close()
	if _, err := client.Invoke(ctx, &awslambda.InvokeInput{FunctionName: name}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("after Close: %v", err)
	}
}

func TestServe(t *testing.T) {
	c := Config{Name: "test-function", Command: []string{Self()}}
	for address, want := range map[string]string{"0.0.0.0:0": "whoever reaches that address", "no port": "choose a free address"} {
		if err := Serve(t.Context(), c, ServeConfig{Listen: address}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", address, err)
		}
	}
	if err := Serve(t.Context(), Config{}, ServeConfig{}); err == nil || !strings.Contains(err.Error(), "no command") {
		t.Errorf("without a command: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ready, done := make(chan net.Addr, 1), make(chan error, 1)
	go func() { done <- Serve(ctx, c, ServeConfig{Ready: func(a net.Addr) { ready <- a }}) }()
	var address net.Addr
	select {
	case address = <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	taken := Serve(ctx, c, ServeConfig{Listen: address.String()})
	if taken == nil || !strings.Contains(taken.Error(), address.String()) {
		t.Errorf("a taken port: %v", taken)
	}
	out, err := sdk("http://"+address.String()).Invoke(ctx, &awslambda.InvokeInput{FunctionName: aws.String("test-function"), Payload: event(t, order{Do: "echo", Value: "x"})})
	if err != nil {
		t.Fatal(err)
	}
	pid := read(t, out.Payload).PID
	stop()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Serve does not end")
	}
	if alive(pid) {
		t.Errorf("instance %d is left", pid)
	}
}

// Signatures are not checked, so any HTTP client will do; the answer has its headers before its status.
func TestPlainHTTP(t *testing.T) {
	p := platform(t, Config{})
	r, err := http.Post(served(t, p)+"/2015-03-31/functions/test-function/invocations", "", strings.NewReader(`{"do":"fail","value":"E"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != 200 || r.Header.Get("X-Amz-Function-Error") != "Unhandled" || r.Header.Get("X-Amzn-Requestid") == "" || r.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%v, %v, %s", err, r.Header, body)
	}
}

func FuzzName(f *testing.F) {
	f.Add("test-function:$LATEST", "Qualifier=1")
	f.Add("arn:aws:lambda:us-east-1:000000000000:function:test-function", "")
	f.Add("arn:::::::::", "Qualifier")
	c := Config{Name: "test-function"}
	f.Fuzz(func(t *testing.T, name, query string) {
		values, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		if c.named(name, values) && !strings.Contains(name, "test-function") {
			t.Errorf("%q is taken for %q", name, c.Name)
		}
	})
}
