package function

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

const (
	maxAsync  = 1024    // invocations accepted that nobody waits for
	tailBytes = 4 << 10 // of the log that LogType Tail returns
)

// InvokeHandler answers Lambda's Invoke API for this function, so that AWS's SDKs and command line work with this
// platform as their endpoint. Signatures are not checked: who reaches the handler may invoke the function.
//
// As on Lambda, a call that is waited for is one attempt, and is refused with status 429 while all instances are taken;
// a call of type Event is queued, retried, and its result dropped.
func (p *Platform) InvokeHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /2015-03-31/functions/{name}/invocations", p.serveInvoke)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		p.refuse(w, newRequestID(), http.StatusNotFound, "UnknownOperationException", fmt.Sprintf("only Invoke is served here, not %s %.200q", r.Method, r.URL.Path))
	})
	return mux
}

func (p *Platform) serveInvoke(w http.ResponseWriter, r *http.Request) {
	id := newRequestID()
	if !p.cfg.named(r.PathValue("name"), r.URL.Query()) {
		p.refuse(w, id, http.StatusNotFound, "ResourceNotFoundException", fmt.Sprintf("Function not found: %.200q; this platform has %s", r.PathValue("name"), p.cfg.arn()))
		return
	}
	kind := r.Header.Get("X-Amz-Invocation-Type")
	limit := int64(MaxPayload)
	switch kind {
	case "", "RequestResponse":
	case "DryRun":
	case "Event":
		limit = MaxAsyncPayload
	default:
		p.refuse(w, id, http.StatusBadRequest, "InvalidParameterValueException", fmt.Sprintf("InvocationType %.40q is not RequestResponse, Event or DryRun", kind))
		return
	}
	payload, err := readBody(r, limit)
	var tooLong *http.MaxBytesError
	switch {
	case errors.As(err, &tooLong) || r.ContentLength > limit:
		w.Header().Set("Connection", "close")
		p.refuse(w, id, http.StatusRequestEntityTooLarge, "RequestTooLargeException", fmt.Sprintf("Request must be smaller than %d bytes for the InvokeFunction operation", limit))
		return
	case err != nil:
		return // the caller has gone
	}
	if len(payload) == 0 {
		payload = []byte("{}")
	}
	if !json.Valid(payload) {
		p.refuse(w, id, http.StatusBadRequest, "InvalidRequestContentException", "Could not parse request body into json")
		return
	}
	switch kind {
	case "DryRun":
		p.begin(w, id)
		w.WriteHeader(http.StatusNoContent)
	case "Event":
		p.serveEvent(w, id, payload)
	default:
		p.serveRequest(w, r, id, payload)
	}
}

// serveRequest runs the function and answers with its result.
func (p *Platform) serveRequest(w http.ResponseWriter, r *http.Request, id string, payload []byte) {
	out := p.invoke(r.Context(), id, payload, 0, false)
	var failed *FunctionError
	switch {
	case errors.Is(out.err, errThrottled):
		w.Header().Set("Retry-After", "1")
		p.refuse(w, id, http.StatusTooManyRequests, "TooManyRequestsException", "Rate Exceeded: "+errThrottled.Error())
		return
	case errors.As(out.err, &failed):
		w.Header().Set("X-Amz-Function-Error", "Unhandled")
		out.body, _ = json.Marshal(failed) // its one raw field was decoded from JSON
	case out.err != nil:
		p.refuse(w, id, http.StatusInternalServerError, "ServiceException", out.err.Error())
		return
	}
	if r.Header.Get("X-Amz-Log-Type") == "Tail" {
		w.Header().Set("X-Amz-Log-Result", base64.StdEncoding.EncodeToString(report(out)))
	}
	p.begin(w, id)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	w.Write(out.body)
}

// serveEvent accepts an invocation that nobody waits for.
func (p *Platform) serveEvent(w http.ResponseWriter, id string, payload []byte) {
	p.mu.Lock()
	full := p.async >= maxAsync
	if p.closed {
		p.mu.Unlock()
		p.refuse(w, id, http.StatusInternalServerError, "ServiceException", ErrClosed.Error())
		return
	}
	if full {
		p.stats.Throttled++
		p.mu.Unlock()
		p.refuse(w, id, http.StatusTooManyRequests, "TooManyRequestsException", "Rate Exceeded: too many events are queued")
		return
	}
	p.async++
	p.owned.Add(1)
	p.mu.Unlock()
	go func() {
		defer p.owned.Done()
		out := p.invoke(context.Background(), id, payload, p.cfg.Retries, true) // Close ends it
		p.mu.Lock()
		p.async--
		p.mu.Unlock()
		if out.err != nil {
			p.log.Error("event dropped", "request", id, "error", out.err)
		}
	}()
	p.begin(w, id)
	w.WriteHeader(http.StatusAccepted)
}

// begin sets the headers of every answer.
func (p *Platform) begin(w http.ResponseWriter, id string) {
	w.Header().Set("X-Amzn-Requestid", id)
	w.Header().Set("X-Amz-Executed-Version", "$LATEST")
}

// refuse answers with an error in the form of AWS's REST protocol.
func (p *Platform) refuse(w http.ResponseWriter, id string, status int, kind, message string) {
	by := "User"
	if status >= 500 {
		by = "Service"
	}
	body, _ := json.Marshal(map[string]string{"Type": by, "Message": message})
	w.Header().Set("X-Amzn-Requestid", id)
	w.Header().Set("X-Amzn-Errortype", kind)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(body)
}

// report is the end of an attempt's log in Lambda's form.
func report(out outcome) []byte {
	i := out.inv
	log := fmt.Sprintf("START RequestId: %s Version: $LATEST\n%s", i.RequestID, out.tail)
	if !strings.HasSuffix(log, "\n") {
		log += "\n"
	}
	log += fmt.Sprintf("END RequestId: %s\nREPORT RequestId: %s\tDuration: %.2f ms\tBilled Duration: %d ms\tMemory Size: %d MB\tMax Memory Used: %d MB\t",
		i.RequestID, i.RequestID, i.Duration.Seconds()*1e3, i.Billed.Milliseconds(), i.MemoryMB, i.PeakMemoryMB)
	if i.Cold {
		log += fmt.Sprintf("Init Duration: %.2f ms\t", i.Init.Seconds()*1e3)
	}
	log += "\n"
	return []byte(log[max(0, len(log)-tailBytes):])
}

// named reports whether a name of the Invoke API, in any of its forms, is this function in its only version.
func (c Config) named(name string, query url.Values) bool {
	qualifier := query.Get("Qualifier")
	parts := strings.Split(name, ":")
	i := 0
	switch {
	case len(parts) >= 7 && parts[0] == "arn": // arn:aws:lambda:REGION:ACCOUNT:function:NAME
		if parts[2] != "lambda" || parts[5] != "function" {
			return false
		}
		i = 6
	case len(parts) >= 3 && parts[1] == "function": // ACCOUNT:function:NAME
		i = 2
	}
	if len(parts) > i+2 || parts[i] != c.Name {
		return false
	}
	if len(parts) == i+2 {
		qualifier = parts[i+1]
	}
	return qualifier == "" || qualifier == "$LATEST"
}
