// Browsers start no workers from files: there, the theme's search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = `<script>postMessage = message => parent.postMessage(message, "*")</script>
        <script src="${url}"></script>`
      this.ready = new Promise(resolve => { frame.onload = () => resolve(frame.contentWindow) })
      addEventListener("message", event => {
        if (event.source === frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      document.documentElement.append(frame)
    }

    async postMessage(message) {
      const worker = await this.ready
      worker.dispatchEvent(new MessageEvent("message", { data: message }))
    }
  }
}
