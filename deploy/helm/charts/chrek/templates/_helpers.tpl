{{/* Names are fixed, since people and other charts refer to them; two releases live in two namespaces. */}}
{{- define "chrek.agent" -}}chrek-agent{{- end }}

{{- define "chrek.claim" -}}
{{- .Values.storage.pvc.existingClaim | default "chrek-pvc" }}
{{- end }}

{{- define "chrek.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "chrek.agent" .) }}
{{- else }}
{{- required "serviceAccount.name is needed when serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "chrek.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* Objects outside the namespace carry it in their name. */}}
{{- define "chrek.clusterName" -}}
{{- printf "chrek-agent-%s" .Release.Namespace }}
{{- end }}

{{- define "chrek.selectorLabels" -}}
app.kubernetes.io/name: chrek
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: agent
{{- end }}

{{- define "chrek.labels" -}}
{{ include "chrek.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end }}
