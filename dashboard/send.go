package dashboard

import (
	"compress/gzip"
	"encoding/json"
	"net/http"
	"strings"
)

// send answers with b, packed where that is understood.
func send(w http.ResponseWriter, r *http.Request, kind string, b []byte) {
	h := w.Header()
	h.Set("Content-Type", kind)
	h.Set("Vary", "Accept-Encoding")
	if !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") || len(b) < 1<<10 {
		w.Write(b)
		return
	}
	h.Set("Content-Encoding", "gzip")
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		panic(err) // the level is one
	}
	z.Write(b)
	z.Close()
}

func sendJSON(w http.ResponseWriter, r *http.Request, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "the run holds a number that cannot be sent", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	send(w, r, "application/json", b)
}
