package spirt

import "github.com/spirt-ml/spirt/events"

// What a run tells of itself; package events has more.
type (
	Event    = events.Event
	Usage    = events.Usage
	PeerDone = events.PeerDone
)
