package main

import (
	"fmt"
	"strings"

	"github.com/spirt-ml/spirt/events"
)

// eventText says in words what a peer or warning event is.
func eventText(e *events.Event) string {
	switch e.Event {
	case "peer":
		text := fmt.Sprintf("peer %d %s", e.Peer, e.State)
		if e.By != 0 { // the whole reason stands in the events
			reason, _, _ := strings.Cut(e.Message, ":")
			return fmt.Sprintf("peer %d: %s (%s)", e.By, text, reason)
		} else if e.Message != "" {
			text += ": " + e.Message
		}
		return text
	}
	return fmt.Sprintf("peer %d: %s", e.Peer, e.Message)
}
