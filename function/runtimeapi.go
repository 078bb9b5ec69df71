package function

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// runtimeAPI serves the Lambda Runtime API (version 2018-06-01) to the one process of in. Whoever else on this machine
// finds the port can disturb this instance, no other.
func (in *instance) runtimeAPI() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /2018-06-01/runtime/invocation/next", in.next)
	mux.HandleFunc("POST /2018-06-01/runtime/invocation/{id}/response", in.response)
	mux.HandleFunc("POST /2018-06-01/runtime/invocation/{id}/error", in.failed)
	mux.HandleFunc("POST /2018-06-01/runtime/init/error", in.initFailed)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-in.spawned
		in.p.mu.Lock()
		if in.ended {
			in.p.mu.Unlock()
			reply(w, http.StatusGone, "InvalidStateTransition", "the instance has ended")
			return
		}
		in.serving.Add(1)
		in.p.mu.Unlock()
		defer in.serving.Done()
		mux.ServeHTTP(w, r)
	})
}

// next hands over the next attempt. Polling says that the one before is over and the instance free.
func (in *instance) next(w http.ResponseWriter, r *http.Request) {
	p := in.p
	p.mu.Lock()
	switch a := in.cur; {
	case in.polling:
		p.mu.Unlock()
		reply(w, http.StatusForbidden, "InvalidStateTransition", "the next invocation is being polled for already")
		return
	case a != nil && !a.delivered.IsZero() && !a.finished:
		p.mu.Unlock()
		reply(w, http.StatusForbidden, "InvalidStateTransition", "invocation "+a.inv.RequestID+" has had no response yet")
		return
	case a == nil || a.finished:
		in.stopTimersLocked()
		in.cur = nil
		in.setBackLocked(false)
		p.idleLocked(in)
	}
	in.polling = true
	pending := in.cur != nil
	p.mu.Unlock()

	if !pending {
		select {
		case <-in.wake:
		case <-in.gone:
		case <-r.Context().Done():
		}
	}
	p.mu.Lock()
	in.polling = false
	if r.Context().Err() != nil { // the process ended, or gave up polling and may come again
		p.unidleLocked(in)
		p.mu.Unlock()
		return
	}
	a := in.cur
	if a == nil || in.doomed != nil {
		p.mu.Unlock()
		reply(w, http.StatusGone, "InvalidStateTransition", "the instance is ending")
		return
	}
	select { // left over by a poll that was given up in the same moment
	case <-in.wake:
	default:
	}
	in.stopTimersLocked()
	now := time.Now()
	if in.state == stateStarting {
		in.state = stateBusy
		a.inv.Init = now.Sub(in.started)
	}
	a.delivered = now
	in.timer = time.AfterFunc(p.cfg.Timeout, func() { in.expire(a) })
	in.out.mark()
	id := a.inv.RequestID
	p.mu.Unlock()

	h := w.Header()
	h.Set("Lambda-Runtime-Aws-Request-Id", id)
	h.Set("Lambda-Runtime-Deadline-Ms", strconv.FormatInt(now.Add(p.cfg.Timeout).UnixMilli(), 10))
	h.Set("Lambda-Runtime-Invoked-Function-Arn", p.cfg.arn())
	h.Set("Lambda-Runtime-Trace-Id", traceID(now, id))
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(a.payload)))
	w.Write(a.payload) // if this fails the process is gone, or is stuck until its deadline
}

// current is the attempt that a request speaks of; without one the request has been answered.
func (in *instance) current(w http.ResponseWriter, r *http.Request) *attempt {
	in.p.mu.Lock()
	a := in.cur
	ok := a != nil && !a.delivered.IsZero() && !a.finished && a.inv.RequestID == r.PathValue("id")
	in.p.mu.Unlock()
	if !ok {
		reply(w, http.StatusBadRequest, "InvalidRequestID", fmt.Sprintf("invocation %.64q is not running here", r.PathValue("id")))
		return nil
	}
	return a
}

// response takes the result of an attempt.
func (in *instance) response(w http.ResponseWriter, r *http.Request) {
	a := in.current(w, r)
	if a == nil {
		return
	}
	body, err := readBody(r, MaxResponse)
	var tooLong *http.MaxBytesError
	switch {
	case errors.As(err, &tooLong):
		msg := fmt.Sprintf("Response payload size exceeded maximum allowed payload size (%d bytes).", MaxResponse)
		in.finish(a, nil, &FunctionError{Type: TypeTooLarge, Message: msg})
		w.Header().Set("Connection", "close")
		reply(w, http.StatusRequestEntityTooLarge, "RequestEntityTooLarge", msg)
		return
	case err != nil: // broken off: the process has ended or its deadline will
		return
	}
	if kind := r.Trailer.Get("Lambda-Runtime-Function-Error-Type"); kind != "" { // the handler failed while it was writing
		in.finish(a, nil, &FunctionError{Type: cut(kind, 256), Message: "the function failed while it wrote its response"})
	} else {
		in.finish(a, body, nil)
	}
	accepted(w)
}

// failed takes the error of an attempt.
func (in *instance) failed(w http.ResponseWriter, r *http.Request) {
	a := in.current(w, r)
	if a == nil {
		return
	}
	body, err := readBody(r, maxErrorBody)
	var tooLong *http.MaxBytesError
	if err != nil && !errors.As(err, &tooLong) {
		return
	}
	failure := decodeFunctionError(r.Header.Get("Lambda-Runtime-Function-Error-Type"), body)
	in.finish(a, nil, failure)
	accepted(w)
}

// initFailed takes the reason why the process cannot start; it is told when the process has ended.
func (in *instance) initFailed(w http.ResponseWriter, r *http.Request) {
	p := in.p
	body, err := readBody(r, maxErrorBody)
	var tooLong *http.MaxBytesError
	if err != nil && !errors.As(err, &tooLong) {
		return
	}
	p.mu.Lock()
	if in.state != stateStarting {
		p.mu.Unlock()
		reply(w, http.StatusForbidden, "InvalidStateTransition", "the instance has started already")
		return
	}
	failure := decodeFunctionError(r.Header.Get("Lambda-Runtime-Function-Error-Type"), body)
	p.mu.Unlock()
	accepted(w)
	http.NewResponseController(w).Flush()
	p.mu.Lock()
	in.killLocked(&FunctionError{Type: TypeInit, Message: failure.Error(), StackTrace: failure.StackTrace})
	p.mu.Unlock()
}

// readBody reads a body of up to limit bytes; over that it returns what fits and a *http.MaxBytesError.
func readBody(r *http.Request, limit int64) ([]byte, error) {
	if n := r.ContentLength; n > 0 && n <= limit {
		body := make([]byte, n)
		_, err := io.ReadFull(r.Body, body)
		return body, err
	}
	return io.ReadAll(http.MaxBytesReader(nil, r.Body, limit))
}

func accepted(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	io.WriteString(w, `{"status":"OK"}`+"\n")
}

// reply answers a request of the Runtime API with an error in its form.
func reply(w http.ResponseWriter, status int, kind, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, "{\"errorType\":%q,\"errorMessage\":%q}\n", kind, message)
}
